-- Ends a job that has not begun within its queue timeout. The caller takes it from its shelf, or it is on none.
local function expire(id)
  local rec = load(id)
  local timeout = tonumber(call('HGET', jkey(id), 'Q') or 0)
  local err = cmsgpack.pack({ '', 'it has not begun within its queue_timeout of ' .. timeout / 1000 .. ' s', '' })
  call('SET', R .. ':e:' .. id, err)
  unshelve('q', rec, id)
  unshelve('i', rec, id)
  call('ZREM', R .. ':qt', id)
  finish(id, rec, 'd', { 'g', 'expired' }, -1)
  write_ends()
end
