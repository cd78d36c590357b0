#!lua flags=allow-oom
-- parts: events
-- Somebody listens to all jobs. ARGV: for how long unless he says so again, and how long events are kept after that, in ms.
-- Returns the id of the newest event.
local key, newest = R .. ':ev', nil
if call('EXISTS', R .. ':evl') == 0 or call('EXISTS', key) == 0 then
  if call('TYPE', key).ok ~= 'stream' then
    call('UNLINK', key)
  end
  call('XADD', key, '*', 'e', cmsgpack.pack({ '-' }))
end
call('SET', R .. ':evl', 1, 'PX', ARGV[1])
call('PEXPIRE', key, ARGV[1] + ARGV[2])
return call('XREVRANGE', key, '+', '-', 'COUNT', 1)[1][1]
