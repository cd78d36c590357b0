#!lua flags=allow-oom
-- parts: events counts queue limits moves promote create hooks ends cancel unique history progress settle expire start
-- A worker's turn: settles what it has finished and fetches what it can start, in one call.
-- ARGV: worker, nonce, how many jobs it wants, lease in ms, flags (1: it takes only jobs to be run alone; 2: put a
-- token on its own bell), number of lanes, (queue, lane) of each, then one packed settle each.
-- Returns now, ms until the next scheduled job (-1: none), refusals (flat: position, text), jobs, 1 when jobs were
-- left behind, 1 when the worker's info is known, how many callbacks wait.
local worker, nonce, want, lease = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local only_alone, poke = tonumber(ARGV[5]) % 2 == 1, tonumber(ARGV[5]) >= 2
local nlanes = tonumber(ARGV[6])
local wkey, held = R .. ':w:' .. worker, R .. ':h:' .. worker

if poke then
  ring_own(worker, 'p')
end
local state = call('HMGET', wkey, 'o', 'oj', 'os', 'info', 'iso', 'pz')
local known = state[4] and 1 or 0
if known == 1 then
  call('ZADD', R .. ':workers', NOW + lease, worker)
else
  -- It was released, and may be dead by now: jobs that it took would wait for the end of a lease, since nobody knows
  -- its process. If it lives it says hello and asks again.
  want = 0
end

if state[1] == nonce then
  -- The answer to this very turn was lost on its way: give it again.
  hand_over_again(state[2], worker)
  return { NOW, 0, cmsgpack.unpack(state[3]), jobs, 1, known, 0 }
end

local refused = settle(7 + 2 * nlanes, #ARGV)
local next_due = promote(128)
local left = 0
-- The queues that are paused: nothing is started of them (pause.lua).
local paused = state[6] and cmsgpack.unpack(state[6])

local function heads(shelf)
  local found = {}
  for i = 1, nlanes do
    local key = R .. ':s:' .. shelf .. ':' .. ARGV[5 + 2 * i] .. ':' .. ARGV[6 + 2 * i]
    local head = call('ZRANGE', key, 0, 0, 'WITHSCORES')
    if head[1] and not (paused and paused[ARGV[5 + 2 * i]]) then
      found[#found + 1] = { key = key, score = tonumber(head[2]), index = i }
      if limits() then
        -- Whoever has no free thread will look again when he has one.
        limited.idle = want > 0
        local lane = found[#found]
        lane.shelf, lane.queue, lane.lane, lane.head = shelf, ARGV[5 + 2 * i], ARGV[6 + 2 * i], head[1]
        lane.actor = string.match(lane.lane, '^[^|]*')
      end
    end
  end
  return limited and limited.startable(found) or found
end

-- Takes the next job from a lane whose jobs take turns; false when none may.
local function take_turn(lane)
  local id, needs, group = limited.first(lane)
  if not id then
    return false
  end
  local before = #ids
  pcall(start, id, worker, expire, needs)
  if #ids > before then
    call('SADD', held, id)
  end
  call('ZREM', lane.key, id)
  if group then
    limited.took(id, lane, group, #ids > before)
  end
  return true
end

-- Takes at most `n` jobs from a lane whose jobs need slots, as long as they come before `bound`; false when there was one
-- that may not start.
local function take_limited(lane, n, bound)
  local run = call('ZRANGEBYSCORE', lane.key, '-inf', bound == math.huge and '+inf' or bound, 'WITHSCORES', 'LIMIT', 0, n)
  local before, left = #ids, {}
  local goes_on = true
  lane.found = nil
  limited.gather_given()
  for i = 1, #run, 2 do
    lane.head, lane.score = run[i], tonumber(run[i + 1])
    local id, needs = limited.look(lane)
    if not id then
      goes_on = false
      break
    end
    pcall(start, id, worker, expire, needs)
    left[#left + 1] = id
  end
  limited.write_given()
  if #ids > before then
    call('SADD', held, unpack(ids, before + 1))
  end
  if left[1] then
    call('ZREM', lane.key, unpack(left))
  end
  return goes_on
end

-- Takes from the lanes in the order of (priority, number) over all of them.
local function take(shelf, n)
  local found = heads(shelf)
  while #found > 0 and #ids < n do
    local best, bound = 1, math.huge
    for i = 2, #found do
      if found[i].score < found[best].score then best = i end
    end
    for i = 1, #found do
      if i ~= best and found[i].score < bound then bound = found[i].score end
    end
    local lane = found[best]
    local goes_on = true
    if lane.turns then
      goes_on = take_turn(lane)
    elseif lane.limited then
      goes_on = take_limited(lane, n - #ids, bound)
    else
      -- As many as come before the head of any other lane.
      local run = call('ZRANGEBYSCORE', lane.key, '-inf', bound == math.huge and '+inf' or bound, 'LIMIT', 0, n - #ids)
      local before = #ids
      for _, id in ipairs(run) do
        pcall(start, id, worker, expire) -- one broken record must not hold up the others
      end
      if #ids > before then
        call('SADD', held, unpack(ids, before + 1))
      end
      call('ZREM', lane.key, unpack(run))
    end
    if goes_on then
      local head = call('ZRANGE', lane.key, 0, 0, 'WITHSCORES')
      lane.score, lane.head = tonumber(head[2]) or lane.score, head[1]
      goes_on = head[1] and (not lane.limited or limited.has_first(lane))
    end
    if not goes_on then
      table.remove(found, best)
    end
  end
  return limited and limited.startable(found) or found
end

local alone_in_hand = state[5] and call('SISMEMBER', held, state[5]) == 1
local may_take = want > 0 and nlanes > 0 and not alone_in_hand
if may_take and call('SCARD', held) == 0 then
  take('i', 1)
  if ids[1] then
    call('HSET', wkey, 'iso', ids[1])
  end
end
if may_take and not ids[1] and not only_alone then
  if limits() then
    -- What may have the slots of jobs that wait for it. They hold them, so no lane is taken from for it.
    local lanes = {}
    for i = 1, nlanes do
      lanes[ARGV[5 + 2 * i] .. ':' .. ARGV[6 + 2 * i]] = not (paused and paused[ARGV[5 + 2 * i]])
    end
    limited.start_lent(want, lanes, function(id, needs, lent)
      local before = #ids
      pcall(start, id, worker, expire, needs, lent)
      if #ids > before then
        call('SADD', held, id)
      end
      return #ids > before
    end)
  end
  for _, lane in ipairs(take('q', want)) do
    -- Somebody else may have a free thread for what is left.
    ring(ARGV[5 + 2 * lane.index], ARGV[6 + 2 * lane.index])
    left = 1
  end
elseif nlanes > 0 and not only_alone then
  for _, lane in ipairs(heads('q')) do
    ring(ARGV[5 + 2 * lane.index], ARGV[6 + 2 * lane.index])
    left = 1
  end
end
call('HSET', wkey, 'o', nonce, 'oj', cmsgpack.pack(given), 'os', cmsgpack.pack(refused))
write_counts()
if known == 0 then
  call('PEXPIRE', wkey, 2 * lease)
end
if limited and limited.again and want > #ids then
  next_due = next_due >= 0 and math.min(next_due, limited.again) or limited.again
end
return { NOW, next_due, refused, jobs, left, known, callbacks_waiting() }
