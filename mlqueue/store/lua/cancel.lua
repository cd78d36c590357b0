#!lua flags=allow-oom
-- parts: events counts queue limits moves create hooks ends
-- ARGV: id. A waiting job ends cancelled; a running one gets the flag and its worker is told. Returns the state that
-- the job was in, or false.
local id = ARGV[1]
local rec = load(id)
if not rec then
  return false
end
if rec.state == 'q' or rec.state == 'w' then
  unshelve(rec.state, rec, id)
  unshelve('i', rec, id)
  call('ZREM', R .. ':sched', id)
  call('ZREM', R .. ':qt', id)
  cancelled(id, rec, 'waiting')
  write_ends()
  write_counts()
elseif rec.state == 'r' and not rec.cancel then
  call('HSET', jkey(id), 'c', NOW)
  emit('state', id)
  ring_own(rec.worker, 'c' .. id)
  tell(id, rec, false)
end
return rec.state
