#!lua flags=allow-oom
-- ARGV: worker, lease in ms, info, then name and queue of each actor that it knows.
call('HSET', R .. ':w:' .. ARGV[1], 'info', ARGV[3])
call('PERSIST', R .. ':w:' .. ARGV[1])
call('ZADD', R .. ':workers', NOW + tonumber(ARGV[2]), ARGV[1])
if #ARGV > 3 then
  call('HSET', R .. ':actors', unpack(ARGV, 4))
end
return NOW
