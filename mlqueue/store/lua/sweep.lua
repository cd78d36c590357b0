#!lua flags=allow-oom
-- parts: events counts queue limits moves promote create hooks ends history late release remove expire unserved course
-- Releases the jobs of workers whose lease has ended, takes back what runs longer than it may, promotes what is due,
-- buries what no worker knows the functions of or what has not begun in time, forgets what has expired.
-- ARGV: sweeper, how long it stays elected in ms, lease in ms, error for stalled jobs, most crashes, most stalls,
-- gap in ms after which nobody is to blame, how long dead jobs are kept in ms (-1: for ever), how long functions may
-- be unknown in ms.
-- Returns 1 when this sweeper is the elected one, ms until it should come again at the latest, ids and outcomes (flat).
local key = R .. ':sweep'
local sweep = call('HMGET', key, 'owner', 'until', 'last', 'course')
if sweep[1] and sweep[1] ~= ARGV[1] and tonumber(sweep[2]) > NOW then
  return { 0, tonumber(sweep[2]) - NOW, {} }
end
call('HSET', key, 'owner', ARGV[1], 'until', NOW + tonumber(ARGV[2]), 'last', NOW)

local lease = tonumber(ARGV[3])
local outcomes = {}
if sweep[3] and NOW - tonumber(sweep[3]) > tonumber(ARGV[7]) then
  -- The server was down, or the machine slept: no worker could renew its lease. Give each a new one.
  for _, worker in ipairs(call('ZRANGE', R .. ':workers', 0, -1)) do
    call('ZADD', R .. ':workers', NOW + lease, worker)
  end
else
  for _, worker in ipairs(call('ZRANGEBYSCORE', R .. ':workers', '-inf', NOW, 'LIMIT', 0, 50)) do
    for _, item in ipairs(release_worker(worker, 'stall', ARGV[4], tonumber(ARGV[5]), tonumber(ARGV[6]))) do
      outcomes[#outcomes + 1] = item
    end
  end
end
take_back_late(outcomes, tonumber(ARGV[6]))
bury_unserved(outcomes, tonumber(ARGV[9]))
promote(1000)
for _, id in ipairs(call('ZRANGEBYSCORE', R .. ':qt', '-inf', NOW, 'LIMIT', 0, 500)) do
  local f = call('HMGET', jkey(id), 's', 'U')
  if f[1] == 'q' and tonumber(f[2]) and pcall(expire, id) then
    outcomes[#outcomes + 1] = id
    outcomes[#outcomes + 1] = 'dead'
  elseif f[1] ~= 'w' then
    call('ZREM', R .. ':qt', id)
  end
end
write_ends()
if limits() then
  limited.mend()
end
write_counts()
local expired = call('ZRANGEBYSCORE', R .. ':exp', '-inf', NOW, 'LIMIT', 0, 2000)
for _, id in ipairs(expired) do
  local told = call('HMGET', R .. ':cb:' .. id, 's', 'h')
  if told[1] == 'p' or told[2] == 'p' then
    call('ZADD', R .. ':exp', NOW + 60000, id) -- what its callback says stands in the record
  elseif not pcall(remove, id) then
    call('ZREM', R .. ':exp', id)
  end
end
if tonumber(ARGV[8]) >= 0 then
  for _, id in ipairs(call('ZRANGEBYSCORE', R .. ':dead', '-inf', NOW - tonumber(ARGV[8]), 'LIMIT', 0, 1000)) do
    local told = call('HMGET', R .. ':cb:' .. id, 's', 'h')
    if told[1] == 'p' or told[2] == 'p' then
      call('ZADD', R .. ':dead', NOW - tonumber(ARGV[8]) + 60000, id) -- as above
    elseif not pcall(remove, id) then
      call('ZREM', R .. ':dead', id)
    end
  end
end
-- Names of shelves that are empty by now: a few each time.
for _, name in ipairs(call('SRANDMEMBER', R .. ':shelves', 5)) do
  if call('EXISTS', R .. ':s:' .. name) == 0 then
    call('SREM', R .. ':shelves', name)
  end
end
local stretch = math.floor(NOW / STRETCH)
if stretch > tonumber(sweep[4] or 0) then
  call('HSET', key, 'course', stretch)
  pcall(note_course) -- whatever is wrong with that, the jobs go on
end
local first = call('ZRANGE', R .. ':workers', 0, 0, 'WITHSCORES')
return { 1, #expired == 2000 and 0 or first[2] and math.max(0, tonumber(first[2]) - NOW) or -1, outcomes }
