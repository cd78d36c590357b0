-- Forgets a job that does not run, with all that belongs to it.
local function remove(id)
  local rec = load(id)
  if rec then
    if rec.state == 'r' then
      return 0
    end
    unshelve(rec.state, rec, id)
    unshelve('i', rec, id)
    local f = call('HMGET', jkey(id), 'G', 'D')
    if f[1] then
      for _, tag in ipairs(cmsgpack.unpack(f[1])) do
        call('ZREM', R .. ':tag:' .. tag, id)
      end
    end
    local unique = f[2] and R .. ':uk:' .. rec.actor .. ':' .. f[2]
    if unique and call('GET', unique) == id then
      call('UNLINK', unique)
    end
    if not ENDED[rec.state] then
      emit('removed', id)
      tell(id, rec, true)
    end
  end
  drop_result(id)
  drop_checkpoint(id)
  local body = call('HGET', jkey(id), 'b')
  if body and string.sub(body, 1, 4) == '\193MQa' then
    local ref = cmsgpack.unpack(string.sub(body, 5))
    drop_chunks(id, 'a' .. ref[1], ref[2])
  end
  call('ZREM', R .. ':sched', id)
  call('ZREM', R .. ':qt', id)
  call('ZREM', R .. ':exp', id)
  call('ZREM', R .. ':dead', id)
  call('UNLINK', jkey(id), R .. ':b:' .. id, R .. ':e:' .. id, R .. ':at:' .. id, R .. ':wt:' .. id,
    R .. ':cb:' .. id, R .. ':ca:' .. id, R .. ':lg:' .. id, R .. ':me:' .. id, R .. ':ch:' .. id)
  return rec and 1 or 0
end
