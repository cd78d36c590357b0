-- Starting jobs, and handing them over to a worker.

local jobs, ids = {}, {}

local function read(id)
  return call('HMGET', jkey(id), 's', 'w', 'k', 'q', 'a', 't', 'b', 'W', 'y', 'x', 'z', 'p', 'P', 'K', 'u', 'i', 'J')
end

-- What the worker gets of a job: id, queue, actor, attempt, created, retries, body, crashes, stalls, priority, parent,
-- whether there is a checkpoint, started, whether it is to run alone.
local function hand_over(id, f, attempt, started)
  return { id, f[4], f[5], attempt, tonumber(f[6]), tonumber(f[9] or 0), f[7] or call('GET', R .. ':b:' .. id) or '',
    tonumber(f[10] or 0), tonumber(f[11] or 0), tonumber(f[12] or 0), f[13] or '', tonumber(f[14] or 0), started,
    tonumber(f[16] or 0) }
end

-- The jobs that an answer which was lost on its way had handed over, as far as the worker holds them still.
local function hand_over_again(packed, worker)
  for _, id in ipairs(cmsgpack.unpack(packed)) do
    local f = read(id)
    if f[1] == 'r' and f[2] == worker then
      jobs[#jobs + 1] = hand_over(id, f, tonumber(f[3]), tonumber(f[15]))
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

-- Starts a queued job; the caller adds `ids` to what the worker holds, and takes them from their shelf.
local function start(id, worker)
  local f = read(id)
  if f[1] ~= 'q' then
    return
  end
  local attempt = tonumber(f[3] or 0) + 1
  call('HSET', jkey(id), 'k', attempt, 'w', worker, 'u', NOW, 's', 'r')
  local timeout = f[4] ~= CALLBACKS and timeout_of(f[17])
  if timeout then
    call('ZADD', R .. ':late', NOW + timeout, id)
  end
  if f[8] then
    tell(id, { watched = f[8] }, false)
  end
  ids[#ids + 1] = id
  jobs[#jobs + 1] = hand_over(id, f, attempt, NOW)
end

local function callbacks_waiting()
  return call('ZCARD', R .. ':s:q:' .. CALLBACKS .. ':' .. CALLBACK)
end
