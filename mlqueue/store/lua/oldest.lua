#!lua flags=no-writes
-- Returns, flat, each queue in which jobs wait, quoted, and for how many ms the one has waited that is there longest.
-- A shelf is sorted by priority first, and by number within one: of each priority the first is the oldest.
local longest = {}
for _, name in ipairs(call('SMEMBERS', R .. ':shelves')) do
  local state, queue = string.match(name, '^(.):([^:]*):')
  if state == 'q' or state == 'i' then
    local key = R .. ':s:' .. name
    local first = call('ZRANGE', key, 0, 0, 'WITHSCORES')
    while first[1] do
      local f = call('HMGET', jkey(first[1]), 'N', 't', 'd')
      longest[queue] = math.max(longest[queue] or 0, NOW - math.max(tonumber(f[1] or f[2] or NOW), tonumber(f[3] or 0)))
      local after = (math.floor(tonumber(first[2]) / PRIORITY) + 1) * PRIORITY
      first = call('ZRANGEBYSCORE', key, string.format('%.0f', after), '+inf', 'WITHSCORES', 'LIMIT', 0, 1)
    end
  end
end
local answer = {}
for queue, waited in pairs(longest) do
  answer[#answer + 1] = queue
  answer[#answer + 1] = waited
end
return answer
