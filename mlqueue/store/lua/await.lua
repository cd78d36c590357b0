#!lua flags=allow-oom
-- parts: events counts queue limits moves create hooks start
-- A job that waits for another one: registers its bell, and has its own worker run the other if it waits in a lane of
-- that worker. ARGV: id and attempt of the one that waits, id of the other, bell, worker, nonce (another after each job
-- that it got), 1 when the worker may start it, then queue and lane of each that it serves.
-- Returns false (there is no such job), or its state, a chain of ids when waiting would never end (else empty), the jobs
-- that were started (none or one), and the worker that holds it ('' when none does).
local id, attempt, target, bell = ARGV[1], tonumber(ARGV[2]), ARGV[3], ARGV[4]
local worker, nonce, may_start = ARGV[5], ARGV[6], ARGV[7] == '1'
local rec = load(target)
if not rec then
  return false
end
local holder = rec.state == 'r' and rec.worker or ''
if rec.state == 's' or rec.state == 'd' or rec.state == 'c' then
  return { rec.state, {}, {}, holder }
end

-- Whom the other waits for, and they: if that leads back here nobody would ever go on. So it is for an ancestor.
local function endless()
  local chain, at = { id, target }, target
  for _ = 1, 10000 do
    if at == id then
      return chain
    end
    local f = call('HMGET', jkey(at), 'A', 's')
    if not f[1] or f[2] ~= 'r' then
      break
    end
    at = f[1]
    chain[#chain + 1] = at
  end
  chain, at = { id }, id
  for _ = 1, 10000 do
    at = call('HGET', jkey(at), 'P')
    if not at then
      return {}
    end
    chain[#chain + 1] = at
    if at == target then
      return chain
    end
  end
  return {}
end

local chain = endless()
if #chain > 0 then
  return { rec.state, chain, {}, holder }
end
local mine = call('HMGET', jkey(id), 's', 'k', 'w')
if mine[1] == 'r' and tonumber(mine[2]) == attempt then
  call('HSET', jkey(id), 'A', target)
end
local key = R .. ':wt:' .. target
call('SADD', key, 'a' .. bell)
call('PEXPIRE', key, 86400000)
if not rec.watched then
  call('HSET', jkey(target), 'W', 1)
end

-- What it needs slots of, where that is limited, and the slots that those who wait for it lend to it; false when it
-- cannot have them now.
local group = string.sub(rec.lane, -1) == '@' and (call('HGET', jkey(target), 'E') or '/') or nil
local needs = rec.state == 'q' and limits() and limited.needs(rec.actor, group) or nil
local lent = nil
if needs and needs[1] then
  local slots, later = limited.borrow(needs, limited.waiting(id, target))
  lent = slots or false
  if later then
    -- If not here and now, it may be started with them by whoever can.
    call('HSET', R .. ':lim:lent', target, id)
  end
end
if limits() and call('HEXISTS', jkey(id), 'H') == 1 then
  -- From now on it lends what it holds.
  for _, other in ipairs(call('HKEYS', R .. ':lim:lent')) do
    local f = call('HMGET', jkey(other), 'q', 'l', 'a')
    if f[1] then
      ring(f[1], f[2] or f[3])
    end
  end
end

local wkey, held = R .. ':w:' .. worker, R .. ':h:' .. worker
if not may_start or call('HEXISTS', wkey, 'info') == 0 then
  return { rec.state, {}, {}, holder }
end
if rec.state == 'r' and rec.worker == worker and call('HGET', jkey(target), 'Y') == nonce then
  -- The answer that handed it over was lost.
  hand_over_again(cmsgpack.pack({ target, rec.attempt }), worker)
  return { rec.state, {}, jobs, holder }
end

-- A job that is to run alone may, where all others only wait.
local function all_wait()
  for _, other in ipairs(call('SMEMBERS', held)) do
    if not call('HGET', jkey(other), 'A') then
      return false
    end
  end
  return true
end

local function startable()
  if (tonumber(call('HGET', jkey(target), 'U')) or math.huge) <= NOW then
    return nil -- its queue timeout is over
  end
  local paused = call('HGET', wkey, 'pz')
  if paused and cmsgpack.unpack(paused)[rec.queue] then
    return nil
  end
  for i = 8, #ARGV, 2 do
    if ARGV[i] == rec.queue and ARGV[i + 1] == rec.lane then
      local shelf = rec.alone and 'i' or 'q'
      return (shelf == 'q' or all_wait()) and R .. ':s:' .. shelf .. ':' .. rec.queue .. ':' .. rec.lane
    end
  end
end

local shelf = rec.state == 'q' and lent ~= false and startable()
if shelf then
  start(target, worker, nil, needs, lent)
  call('SADD', held, target)
  call('ZREM', shelf, target)
  if lent then
    call('HDEL', R .. ':lim:lent', target)
  end
  if group and not rec.alone then
    limited.took(target, rec, group, true)
  end
  call('HSET', jkey(target), 'Y', nonce)
  if rec.alone then
    local iso = call('HGET', wkey, 'iso')
    if not iso or call('SISMEMBER', held, iso) == 0 then
      call('HSET', wkey, 'iso', target)
    end
  end
end
write_counts()
return { rec.state, {}, jobs, holder }
