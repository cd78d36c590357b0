#!lua flags=no-writes
-- Returns for each limit: name, capacity, who set it (hand, worker, or '' for neither), and flat, slots and who holds each
-- (id and attempt). ARGV: nothing. Limits by key are those in use.
local key, names, answer = R .. ':lim', {}, {}
for _, name in ipairs(call('HKEYS', key)) do
  names[string.sub(name, 1, 1) == '~' and string.sub(name, 2) or name] = true
end
for _, packed in ipairs(call('HVALS', R .. ':lim:a')) do
  for _, need in ipairs(cmsgpack.unpack(packed)[1]) do
    names[need[1]] = true
  end
end
for _, name in ipairs(call('SMEMBERS', R .. ':lim:used')) do
  names[name] = true
end
for name in pairs(names) do
  local base = string.match(name, '^[^/]*')
  local set = call('HMGET', key, base, '~' .. base)
  answer[#answer + 1] = { name, tonumber(set[1] or set[2] or 1), set[1] and 'hand' or set[2] and 'worker' or '',
    call('HGETALL', R .. ':lim:s:' .. name) }
end
return answer
