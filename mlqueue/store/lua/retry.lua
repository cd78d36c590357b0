#!lua
-- parts: queue moves ends
-- ARGV: id. A dead or cancelled job goes back to the end of its queue with its counts at nought; its attempt goes on.
-- Returns the state that the job was in, or false.
local id = ARGV[1]
local rec = load(id)
if not rec then
  return false
end
if rec.state ~= 'd' and rec.state ~= 'c' then
  return rec.state
end
local was = rec.state
unshelve(was, rec, id)
call('ZREM', R .. ':exp', id)
drop_result(id)
call('UNLINK', R .. ':e:' .. id)
call('HDEL', jkey(id), 'x', 'y', 'z', 'g', 'c', 'f', 'i', 'r', 'v', 'V', 'd')
rec.number = call('INCR', R .. ':seq')
rec.crashes, rec.alone = 0, nil
local tags = call('HGET', jkey(id), 'G')
if tags then
  for _, tag in ipairs(cmsgpack.unpack(tags)) do
    call('ZADD', R .. ':tag:' .. tag, rec.number, id)
  end
end
requeue(id, rec, { 'n', rec.number, 'N', NOW })
return was
