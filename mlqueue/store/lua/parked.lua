#!lua flags=no-writes
-- Who waits for limits. ARGV: how many lanes are told of each limit at most.
-- Returns for each limit for which somebody waits its name, and for each lane that is parked there (or group of one, where
-- jobs take turns) its queue, the lane, how many jobs wait in it, and which of them comes first.
local most, answer = tonumber(ARGV[1]), {}
for _, name in ipairs(call('SMEMBERS', R .. ':park')) do
  local lanes = {}
  for _, member in ipairs(call('ZRANGE', R .. ':park:' .. name, 0, most - 1)) do
    local queue, lane, group = string.match(member, '^([^:]*):([^ ]*) ?(.*)$')
    local key = group == '' and R .. ':s:q:' .. queue .. ':' .. lane
      or R .. ':fair:g:' .. queue .. ':' .. lane .. ':' .. group
    local first = call('ZRANGE', key, 0, 0)[1]
    if first then
      lanes[#lanes + 1] = { queue, lane, call('ZCARD', key), first }
    end
  end
  if lanes[1] then
    answer[#answer + 1] = { name, lanes }
  end
end
return answer
