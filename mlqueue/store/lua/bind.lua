#!lua flags=allow-oom
-- Binds a timeout to all jobs of the namespace, or renews the bond. ARGV: who, timeout in ms, most timeouts, how long the
-- bond holds in ms (0: it ends). Jobs that run already are bound by the first call.
if ARGV[4] == '0' then
  return call('HDEL', R .. ':reapers', ARGV[1])
end
local timeout = tonumber(ARGV[2])
local before = call('HGET', R .. ':reapers', ARGV[1])
call('HSET', R .. ':reapers', ARGV[1], cmsgpack.pack({ timeout, tonumber(ARGV[3]), NOW + tonumber(ARGV[4]) }))
if before and cmsgpack.unpack(before)[1] == timeout and cmsgpack.unpack(before)[3] > NOW then
  return 0
end
local found = 0
for _, worker in ipairs(call('ZRANGE', R .. ':workers', 0, -1)) do
  for _, id in ipairs(call('SMEMBERS', R .. ':h:' .. worker)) do
    local f = call('HMGET', jkey(id), 's', 'u', 'J', 'q')
    if f[1] == 'r' and not f[3] and f[4] ~= 'mlqueue.callbacks' then
      call('ZADD', R .. ':late', 'LT', tonumber(f[2]) + timeout, id)
      found = found + 1
    end
  end
end
return found
