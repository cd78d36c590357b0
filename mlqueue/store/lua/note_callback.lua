#!lua flags=allow-oom
-- parts: events counts
-- One try to deliver the callback of a job, or an event to its webhook. ARGV: id, how it stands now (p, d, f), the try
-- (MessagePack), for a webhook the id of the delivery (else ''), 1 when the receiver wants no more.
-- Returns 1, or 0 when the job is gone.
local key, about = R .. ':ca:' .. ARGV[1], R .. ':cb:' .. ARGV[1]
if call('EXISTS', jkey(ARGV[1])) == 0 then
  return 0
end
if ARGV[4] == '' then
  call('HSET', about, 's', ARGV[2])
elseif call('HGET', about, 'i') == ARGV[4] then -- else there has been another event since
  call('HSET', about, 'h', ARGV[2])
end
if ARGV[5] == '1' then
  if string.find(call('HGET', jkey(ARGV[1]), 'C') or '', '1', 1, true) then
    call('HSET', jkey(ARGV[1]), 'C', 1)
  else
    call('HDEL', jkey(ARGV[1]), 'C')
  end
end
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
