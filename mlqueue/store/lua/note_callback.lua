#!lua flags=allow-oom
-- parts: events counts
-- One try to deliver the callback of a job. ARGV: id, how it stands now (p, d, f), the try (MessagePack).
-- Returns 1, or 0 when the job is gone.
local key = R .. ':ca:' .. ARGV[1]
if call('EXISTS', jkey(ARGV[1])) == 0 then
  return 0
end
call('HSET', R .. ':cb:' .. ARGV[1], 's', ARGV[2])
if call('LINDEX', key, -1) ~= ARGV[3] then -- sent again because the answer was lost
  call('RPUSH', key, ARGV[3])
  count('c:' .. ARGV[2])
  write_counts()
  emit('callback', ARGV[1])
  if call('LLEN', key) > 50 then
    call('LPOP', key)
  end
end
return 1
