#!lua flags=allow-oom
-- ARGV: worker, lease in ms, info, then of each actor that it knows the name, the queue (and keys, as R:actors has them)
-- and what web processes are told of it ('' when it is not to be called by them).
call('HSET', R .. ':w:' .. ARGV[1], 'info', ARGV[3])
call('PERSIST', R .. ':w:' .. ARGV[1])
call('ZADD', R .. ':workers', NOW + tonumber(ARGV[2]), ARGV[1])
local paused = call('HKEYS', R .. ':paused')
if paused[1] then
  local names = {}
  for _, name in ipairs(paused) do
    names[name] = 1
  end
  call('HSET', R .. ':w:' .. ARGV[1], 'pz', cmsgpack.pack(names))
end
for i = 4, #ARGV, 3 do
  call('HSET', R .. ':actors', ARGV[i], ARGV[i + 1])
  if ARGV[i + 2] ~= '' then
    call('HSET', R .. ':http', ARGV[i], ARGV[i + 2])
  else
    call('HDEL', R .. ':http', ARGV[i])
  end
end
return NOW
