#!lua flags=allow-oom
-- A group whose children are counted in another store from now on. ARGV: UUID. What is completed here later waits in
-- R:mig:gl (part_settle.lua). Returns how many children there are, for how many ms the group is kept, and those that have
-- completed; false when there is no such group.
local key = R .. ':g:' .. ARGV[1]
local parties, left = tonumber(call('GET', key .. ':n') or -1), call('PTTL', key .. ':n')
if parties == -1 then
  return false
end
if parties ~= -2 then
  call('HSET', R .. ':mig:g', ARGV[1], parties)
  call('SET', key .. ':n', -2, 'PX', math.max(1, left))
end
return { tonumber(call('HGET', R .. ':mig:g', ARGV[1]) or -1), left, call('SMEMBERS', key) }
