-- Putting jobs where they wait.

-- Where callbacks wait to be delivered.
local CALLBACKS, CALLBACK = 'mlqueue.callbacks', 'mlqueue.callback'

-- A job that has crashed so often runs with no other job beside it.
local ISOLATE_AFTER = 2

local shelved = {}

-- The functions of part_limits.lua; false where no limits are in use, and `surely` where they are from now on.
local make_limits, limited = nil, nil

local function limits(surely)
  if limited == nil or surely and not limited then
    limited = (surely or call('EXISTS', R .. ':lim:a', R .. ':fair:n') > 0) and make_limits()
  end
  return limited
end

local function shelve(state, rec, id)
  local name = state .. ':' .. rec.queue .. ':' .. rec.lane
  local score = rec.number
  if state == 'q' or state == 'i' then
    score = rec.priority * PRIORITY + score
  end
  call('ZADD', R .. ':s:' .. name, score, id)
  if not shelved[name] then
    shelved[name] = true
    call('SADD', R .. ':shelves', name)
  end
  if state == 'q' and string.sub(rec.lane, -1) == '@' then
    limits(true).join(id, rec, score)
  end
end

local function ring(queue, lane)
  local key = R .. ':bell:' .. queue .. ':' .. lane
  if call('EXISTS', key) == 0 then
    call('RPUSH', key, 1)
  end
end

local function ring_own(bell, token)
  local key = R .. ':wb:' .. bell
  if call('LLEN', key) >= 1000 then
    return -- nobody listens; one who does looks again by himself before long
  end
  call('RPUSH', key, token)
  call('PEXPIRE', key, 120000)
end

-- A list of functions that no worker may have heard of: each looks whether it has them all.
local function announce(lane)
  if call('SADD', R .. ':fl', lane) == 1 then
    for _, worker in ipairs(call('ZRANGE', R .. ':workers', 0, -1)) do
      ring_own(worker, 'l')
    end
  end
end

local has_late = nil

-- Takes a running job from the indexes of running ones. Its state is written by the caller.
local function leave(id, rec)
  call('SREM', R .. ':h:' .. rec.worker, id)
  if has_late == nil then
    has_late = call('EXISTS', R .. ':late') == 1
  end
  if has_late then
    call('ZREM', R .. ':late', id)
  end
  if rec.awaits then
    call('HDEL', jkey(id), 'A')
  end
  if limits() then
    limited.free(id, rec)
  end
end

-- Ring those who wait: all of them at the end, else only those who asked for every change. The token is the id, and
-- `how` it ended, if that is known.
local function tell(id, rec, ended, how)
  if not rec.watched then
    return
  end
  local key = R .. ':wt:' .. id
  for _, bell in ipairs(call('SMEMBERS', key)) do
    if ended or string.sub(bell, 1, 1) == 'a' then
      ring_own(string.sub(bell, 2), how and id .. ' ' .. how or id)
    end
  end
  if ended then
    call('UNLINK', key)
  end
end

-- Puts a job back where it stood in its lane, or where it waits to be run alone. `idle`: its attempt had not begun.
local function requeue(id, rec, fields, idle)
  if idle then
    local over, attempt = string.match(call('HGET', jkey(id), 'U') or '', '^(%d+) (%d+)$')
    if over and tonumber(attempt) == rec.attempt then
      fields[#fields + 1] = 'U'
      fields[#fields + 1] = over
      call('ZADD', R .. ':qt', over, id)
    end
  end
  local shelf = rec.crashes >= ISOLATE_AFTER and 'i' or 'q'
  shelve(shelf, rec, id)
  if rec.state == 'r' then
    leave(id, rec)
  end
  if string.find(rec.lane, '|', 1, true) then
    announce(rec.queue .. ':' .. rec.lane)
  end
  if shelf == 'i' then
    fields[#fields + 1] = 'i'
    fields[#fields + 1] = 1
  elseif rec.alone then
    call('HDEL', jkey(id), 'i')
  end
  fields[#fields + 1] = 's'
  fields[#fields + 1] = 'q'
  call('HSET', jkey(id), unpack(fields))
  emit('state', id)
  ring(rec.queue, rec.lane)
  tell(id, rec, false)
  return shelf
end

local function schedule(id, rec, due, fields)
  shelve('w', rec, id)
  call('ZADD', R .. ':sched', due, id)
  if rec.state == 'r' then
    leave(id, rec)
  end
  fields[#fields + 1] = 'd'
  fields[#fields + 1] = due
  fields[#fields + 1] = 's'
  fields[#fields + 1] = 'w'
  call('HSET', jkey(id), unpack(fields))
  emit('state', id)
  -- Idle workers sleep until the job that was the earliest so far: wake one to look again.
  if call('ZRANGE', R .. ':sched', 0, 0)[1] == id then
    ring(rec.queue, rec.lane)
  end
  tell(id, rec, false)
end
