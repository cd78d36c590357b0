#!lua
-- parts: queue moves ends
-- ARGV: id, body ('' as it is), nonce. A dead or cancelled job goes back to the end of its queue with its counts at nought; its
-- attempt goes on.
-- Returns the state that the job was in, or false.
local id = ARGV[1]
local rec = load(id)
if not rec then
  return false
end
if call('HGET', jkey(id), 'M') == ARGV[3] then
  return 'd' -- it has been done; only the answer was lost
end
if rec.state ~= 'd' and rec.state ~= 'c' then
  return rec.state
end
local was = rec.state
unshelve(was, rec, id)
call('ZREM', R .. ':exp', id)
call('ZREM', R .. ':dead', id)
drop_result(id)
call('UNLINK', R .. ':e:' .. id)
call('HDEL', jkey(id), 'x', 'y', 'z', 'g', 'c', 'f', 'i', 'r', 'v', 'V', 'd', 'h', 'O')
if ARGV[2] and ARGV[2] ~= '' then
  if #ARGV[2] <= 64 then
    call('HSET', jkey(id), 'b', ARGV[2])
    call('UNLINK', R .. ':b:' .. id)
  else
    call('SET', R .. ':b:' .. id, ARGV[2])
    call('HDEL', jkey(id), 'b')
  end
end
rec.number = call('INCR', R .. ':seq')
rec.crashes, rec.alone = 0, nil
local tags = call('HGET', jkey(id), 'G')
if tags then
  for _, tag in ipairs(cmsgpack.unpack(tags)) do
    call('ZADD', R .. ':tag:' .. tag, rec.number, id)
  end
end
requeue(id, rec, { 'n', rec.number, 'N', NOW, 'M', ARGV[3] })
return was
