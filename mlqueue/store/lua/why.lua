#!lua flags=no-writes
-- parts: events queue limits
-- What a job that waits lacks. ARGV: id. Returns false (there is no such job), or for each limit that has no room for it:
-- name, how many slots it needs, how many there are, and flat, the jobs that hold them and when each was started.
local id = ARGV[1]
local f = call('HMGET', jkey(id), 's', 'a', 'E')
if not f[1] then
  return false
end
local answer = {}
if f[1] ~= 'q' and f[1] ~= 'w' or not limits() then
  return answer
end
for _, need in ipairs(limited.needs(f[2], f[3] or nil)) do
  local name, number = need[1], need[2]
  local key, most = R .. ':lim:s:' .. name, limited.capacity(name)
  if call('HLEN', key) + number > most then
    local holders, seen = {}, {}
    for _, holder in ipairs(call('HVALS', key)) do
      local other = string.match(holder, '^%S+')
      if not seen[other] and #holders < 40 then
        seen[other] = true
        holders[#holders + 1] = other
        holders[#holders + 1] = tonumber(call('HGET', jkey(other), 'u') or 0)
      end
    end
    answer[#answer + 1] = { name, number, most, holders }
  end
end
return answer
