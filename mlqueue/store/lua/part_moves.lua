-- Moves between the states that a job passes through before its end.

-- A job that has crashed so often runs with no other job beside it.
local ISOLATE_AFTER = 2

local shelved = {}

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
end

local function unshelve(state, rec, id)
  call('ZREM', R .. ':s:' .. state .. ':' .. rec.queue .. ':' .. rec.lane, id)
end

local function ring(queue, lane)
  local key = R .. ':bell:' .. queue .. ':' .. lane
  if call('EXISTS', key) == 0 then
    call('RPUSH', key, 1)
  end
end

local function ring_own(bell, token)
  local key = R .. ':wb:' .. bell
  call('RPUSH', key, token)
  call('PEXPIRE', key, 120000)
end

-- The record's fields that moves need, or nil when there is none.
local function load(id)
  local f = call('HMGET', jkey(id), 's', 'k', 'w', 'q', 'a', 'n', 'T', 'l', 'p', 'c', 'W', 'K', 'x', 'i')
  if not f[1] then
    return nil
  end
  return {
    state = f[1], attempt = tonumber(f[2] or 0), worker = f[3], queue = f[4], actor = f[5], number = tonumber(f[6]),
    ttl = tonumber(f[7] or -1), lane = f[8] or f[5], priority = tonumber(f[9] or 0), cancel = f[10], watched = f[11],
    checkpoint = f[12], crashes = tonumber(f[13] or 0), alone = f[14],
  }
end

-- Ring those who wait: all of them at the end, else only those who asked for every change.
local function tell(id, rec, ended)
  if not rec.watched then
    return
  end
  local key = R .. ':wt:' .. id
  for _, bell in ipairs(call('SMEMBERS', key)) do
    if ended or string.sub(bell, 1, 1) == 'a' then
      ring_own(string.sub(bell, 2), id)
    end
  end
  if ended then
    call('UNLINK', key)
  end
end

-- Puts a job back where it stood in its lane, or where it waits to be run alone.
local function requeue(id, rec, fields)
  local shelf = rec.crashes >= ISOLATE_AFTER and 'i' or 'q'
  shelve(shelf, rec, id)
  if rec.state == 'r' then
    call('SREM', R .. ':h:' .. rec.worker, id)
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
  ring(rec.queue, rec.lane)
  tell(id, rec, false)
  return shelf
end

local function schedule(id, rec, due, fields)
  shelve('w', rec, id)
  call('ZADD', R .. ':sched', due, id)
  if rec.state == 'r' then
    call('SREM', R .. ':h:' .. rec.worker, id)
  end
  fields[#fields + 1] = 'd'
  fields[#fields + 1] = due
  fields[#fields + 1] = 's'
  fields[#fields + 1] = 'w'
  call('HSET', jkey(id), unpack(fields))
  -- Idle workers sleep until the job that was the earliest so far: wake one to look again.
  if call('ZRANGE', R .. ':sched', 0, 0)[1] == id then
    ring(rec.queue, rec.lane)
  end
  tell(id, rec, false)
end

-- Moves jobs that are due from the schedule into their lanes; at most `limit` a call. Returns ms until the next, or -1.
local function promote(limit)
  local first = call('ZRANGE', R .. ':sched', 0, 0, 'WITHSCORES')
  if first[2] and tonumber(first[2]) <= NOW then
    for _, id in ipairs(call('ZRANGEBYSCORE', R .. ':sched', '-inf', NOW, 'LIMIT', 0, limit)) do
      local rec = load(id)
      if rec and rec.state == 'w' then
        unshelve('w', rec, id)
        requeue(id, rec, {})
      end
      call('ZREM', R .. ':sched', id)
    end
    first = call('ZRANGE', R .. ':sched', 0, 0, 'WITHSCORES')
  end
  return first[2] and math.max(0, tonumber(first[2]) - NOW) or -1
end
