-- Starting jobs, and handing them over to a worker.

-- `given`, flat: ids and attempts, for an answer that is lost on its way.
local jobs, ids, given = {}, {}, {}

local function read(id)
  return call('HMGET', jkey(id), 's', 'w', 'k', 'q', 'a', 't', 'b', 'W', 'y', 'x', 'z', 'p', 'P', 'K', 'u', 'i', 'J',
    'N', 'l', 'd', 'U', 'C')
end

-- What the worker gets of a job: id, queue, actor, attempt, created (or retried by hand: its age begins anew), retries,
-- body, crashes, stalls, priority, parent, whether there is a checkpoint, started, whether it is to run alone, its lane
-- (when it is not the actor); and the slots that it holds, if it does.
local function hand_over(id, f, attempt, started)
  return { id, f[4], f[5], attempt, tonumber(f[18] or f[6]), tonumber(f[9] or 0),
    f[7] or call('GET', R .. ':b:' .. id) or '', tonumber(f[10] or 0), tonumber(f[11] or 0), tonumber(f[12] or 0),
    f[13] or '', tonumber(f[14] or 0), started, tonumber(f[16] or 0), f[19] or '' }
end

-- The jobs that an answer which was lost on its way had handed over, as far as the worker holds them still.
local function hand_over_again(packed, worker)
  local items = cmsgpack.unpack(packed)
  for i = 1, #items, 2 do
    local id = items[i]
    local f = read(id)
    if f[1] == 'r' and f[2] == worker and tonumber(f[3]) == items[i + 1] then
      jobs[#jobs + 1] = hand_over(id, f, tonumber(f[3]), tonumber(f[15]))
      jobs[#jobs][16] = call('HGET', jkey(id), 'H') or nil
    end
  end
end

local bound = nil

-- How long a job may run in ms: its own timeout, else the shortest that is bound to the namespace; nil when none is.
local function timeout_of(own)
  if own then
    return tonumber(own)
  end
  if bound == nil then
    bound = false
    for i, value in ipairs(call('HVALS', R .. ':reapers')) do
      local item = cmsgpack.unpack(value)
      if item[3] > NOW and (not bound or item[1] < bound) then
        bound = item[1]
      end
    end
  end
  return bound or nil
end

-- Starts a queued job; the caller adds `ids` to what the worker holds, and takes them from their shelf. One whose queue
-- timeout is over is given to `expire` instead. needs: the slots that it needs, lent: those of them that others lend to it
-- (part_limits.lua).
local function start(id, worker, expire, needs, lent)
  local f = read(id)
  if f[1] ~= 'q' then
    return
  end
  local attempt = tonumber(f[3] or 0) + 1
  if f[21] and tonumber(f[21]) then
    if tonumber(f[21]) <= NOW then
      return expire(id)
    end
    call('HSET', jkey(id), 'U', f[21] .. ' ' .. attempt)
    call('ZREM', R .. ':qt', id)
  end
  local slots = needs and limited.grab(id, attempt, needs, lent)
  if attempt > 1 then
    -- What an earlier attempt reported, used, held and began from, and who started it; by how much it was prolonged.
    call('HDEL', jkey(id), 'v', 'V', 'Y', 'j', 'e', 'H', 'R')
  end
  if f[14] then
    local saved = call('HMGET', R .. ':ck:' .. id, 'a', 't', 'z')
    if saved[1] then
      call('HSET', jkey(id), 'R', table.concat(saved, ' '))
    end
  end
  if slots then
    call('HSET', jkey(id), 'k', attempt, 'w', worker, 'u', NOW, 'H', slots, 's', 'r')
  else
    call('HSET', jkey(id), 'k', attempt, 'w', worker, 'u', NOW, 's', 'r')
  end
  emit('state', id)
  -- How long it has waited since it was created, was retried by hand, or was due. Of one that was put back at once that
  -- is not known.
  local since = f[20] or f[18] or f[6]
  if f[4] ~= CALLBACKS and (not f[15] or tonumber(since) > tonumber(f[15])) then
    waits = observe(waits, f[5], NOW - since)
  end
  local timeout = f[4] ~= CALLBACKS and timeout_of(f[17])
  if timeout then
    call('ZADD', R .. ':late', NOW + timeout, id)
  end
  if f[8] then
    tell(id, { watched = f[8] }, false)
  end
  if f[22] and string.find(f[22], 'r', 1, true) then
    pcall(call_back, id, { callback = f[22], attempt = attempt }, 'r') -- whatever is wrong with it, the job goes on
  end
  ids[#ids + 1] = id
  given[#given + 1], given[#given + 2] = id, attempt
  jobs[#jobs + 1] = hand_over(id, f, attempt, NOW)
  jobs[#jobs][16] = slots
end

local function callbacks_waiting()
  return call('ZCARD', R .. ':s:q:' .. CALLBACKS .. ':' .. CALLBACK)
end
