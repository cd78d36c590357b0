-- Taking jobs from attempts that run longer than they may.

-- The shortest timeout that is bound to the namespace, and its most timeouts; bonds that nobody renews are forgotten.
local function bond()
  local shortest, most = nil, nil
  local all = call('HGETALL', R .. ':reapers')
  for i = 1, #all, 2 do
    local item = cmsgpack.unpack(all[i + 1])
    if item[3] <= NOW then
      call('HDEL', R .. ':reapers', all[i])
    elseif not shortest or item[1] < shortest then
      shortest, most = item[1], item[2]
    end
  end
  return shortest, most
end

local function take_back(id, rec, timeout, most)
  ring_own(rec.worker, 't' .. rec.attempt .. ' ' .. id)
  if rec.cancel then
    cancelled(id, rec, 'lost')
    return 'cancelled'
  end
  local err = cmsgpack.pack({ '', 'it ran longer than its timeout of ' .. timeout / 1000 .. ' s', '' })
  local times = tonumber(call('HGET', jkey(id), 'O') or 0)
  call('SET', R .. ':e:' .. id, err)
  note_attempt(id, rec, 'stalled', err)
  count('o:' .. rec.actor)
  if times >= most then
    finish(id, rec, 'd', { 'g', 'stalled', 'O', times }, -1)
    return 'dead'
  end
  requeue(id, rec, { 'O', times + 1 })
  return 'queued'
end

local function take_back_late(outcomes, most_stalls)
  local due = call('ZRANGEBYSCORE', R .. ':late', '-inf', NOW, 'LIMIT', 0, 500)
  if #due == 0 then
    return
  end
  local shortest, most = bond()
  for _, id in ipairs(due) do
    local well, outcome = pcall(function()
      local rec = load(id)
      if not rec or rec.state ~= 'r' then
        call('ZREM', R .. ':late', id)
        return nil
      end
      local f = call('HMGET', jkey(id), 'J', 'u', 'Z')
      local own = tonumber(f[1])
      local timeout, limit = own or shortest, own and tonumber(f[3] or most_stalls) or most
      if not timeout then
        call('ZREM', R .. ':late', id) -- who bound it has stopped
        return nil
      end
      local over = tonumber(f[2]) + timeout
      if over > NOW then
        call('ZADD', R .. ':late', over, id)
        return nil
      end
      return take_back(id, rec, timeout, limit)
    end)
    if well and outcome then
      outcomes[#outcomes + 1] = id
      outcomes[#outcomes + 1] = outcome
    elseif not well then
      call('ZREM', R .. ':late', id)
    end
  end
end
