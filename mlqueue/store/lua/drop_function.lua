#!lua flags=allow-oom
-- parts: events queue
-- Forgets a posted function, and tells all workers. ARGV: name. Returns 1, or 0 when there is none.
local name = ARGV[1]
if call('HDEL', R .. ':pf', name) == 0 then
  return 0
end
-- Nothing that was signed before now is taken any more. Serials are microseconds.
local serial = math.max(tonumber(call('HGET', R .. ':pfs', name) or 0), NOW * 1000)
call('HSET', R .. ':pfs', name, string.format('%.0f', serial))
call('HDEL', R .. ':pfe', name)
call('INCR', R .. ':pfv')
for _, worker in ipairs(call('ZRANGE', R .. ':workers', 0, -1)) do
  ring_own(worker, 'f')
end
return 1
