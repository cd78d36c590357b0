-- Cancels a job: one that waits ends, one that runs is told, and ends by itself.
local function cancel(id, rec)
  if rec.state == 'q' or rec.state == 'w' then
    unshelve(rec.state, rec, id)
    unshelve('i', rec, id)
    call('ZREM', R .. ':sched', id)
    call('ZREM', R .. ':qt', id)
    cancelled(id, rec, 'waiting')
  elseif rec.state == 'r' and not rec.cancel then
    call('HSET', jkey(id), 'c', NOW)
    emit('state', id)
    ring_own(rec.worker, 'c' .. id)
    tell(id, rec, false)
  end
end
