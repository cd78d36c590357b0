-- Taking jobs from attempts that run longer than they may. A timeout that was prolonged counts from there.

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

-- Ends an attempt that has run too long. text: what it ran longer than; most: so often may that be; stage: killed when
-- its process was.
local function give_up(id, rec, text, most, stage)
  if rec.cancel then
    cancelled(id, rec, stage or 'lost')
    return 'cancelled'
  end
  local err = cmsgpack.pack({ '', text, '' })
  local times = tonumber(call('HGET', jkey(id), 'O') or 0)
  call('SET', R .. ':e:' .. id, err)
  note_attempt(id, rec, 'stalled', err, stage)
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
      local f = call('HMGET', jkey(id), 'J', 'u', 'Z', 'j')
      local own = tonumber(f[1])
      local timeout, limit = own or shortest, own and tonumber(f[3] or most_stalls) or most
      if not timeout then
        call('ZREM', R .. ':late', id) -- who bound it has stopped
        return nil
      end
      local over = tonumber(f[2]) + timeout + tonumber(string.match(f[4] or '', '^%d+') or 0)
      if over > NOW then
        call('ZADD', R .. ':late', over, id)
        return nil
      end
      ring_own(rec.worker, 't' .. rec.attempt .. ' ' .. id)
      return give_up(id, rec, 'it ran longer than its timeout of ' .. timeout / 1000 .. ' s', limit)
    end)
    if well and outcome then
      outcomes[#outcomes + 1] = id
      outcomes[#outcomes + 1] = outcome
    elseif not well then
      call('ZREM', R .. ':late', id)
    end
  end
end
