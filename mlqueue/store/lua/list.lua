#!lua flags=no-writes
-- Lists jobs, newest first. ARGV: states (letters), queue ('' any), actor ('' any), tag ('' any), since ms (-1 any),
-- until ms (-1 any), number below which to list (-1 any), how many.
-- Returns the number to go on below (-1: that was all) and the records: id, fields (flat) of each.
-- A shelf is sorted by number, which is also the order of creation, so pages stay stable while jobs come and go.
local states, queue, actor, tag = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local since, till, below, limit = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8])
local found = {}

-- Of these only who asks for this queue wants to hear.
local CALLBACKS = 'mlqueue.callbacks'

-- When a job got its number: at its creation, or when it was retried by hand.
local function created(id)
  local f = call('HMGET', jkey(id), 'N', 't')
  return tonumber(f[1] or f[2] or 0)
end

-- The members of a sorted set between two ranks (counted from the highest) are in falling order of number: finds
-- the first that was created at `till` or before.
local function skip_newer(key, low, high)
  while low < high do
    local middle = math.floor((low + high) / 2)
    local id = call('ZREVRANGE', key, middle, middle)[1]
    if id and created(id) > till then low = middle + 1 else high = middle end
  end
  return low
end

local function gather(key, base, low, high)
  if below >= 0 then
    local above = call('ZCOUNT', key, string.format('%.0f', base + below), '+inf')
    low = math.max(low, math.min(above, high))
  end
  if till >= 0 then
    low = skip_newer(key, low, high)
  end
  if low >= high then
    return
  end
  local page = call('ZREVRANGE', key, low, math.min(low + limit + 1, high) - 1, 'WITHSCORES')
  for i = 1, #page, 2 do
    found[#found + 1] = { page[i], tonumber(page[i + 1]) - base }
  end
end

-- A shelf of waiting jobs is sorted by priority first: each priority is a stretch of its own.
local function gather_waiting(key)
  local rank, size = 0, call('ZCARD', key)
  while rank < size do
    local score = tonumber(call('ZREVRANGE', key, rank, rank, 'WITHSCORES')[2])
    local base = math.floor(score / PRIORITY) * PRIORITY
    local past = call('ZCOUNT', key, string.format('%.0f', base), '+inf')
    gather(key, base, rank, past)
    rank = past
  end
end

local function gather_running()
  for _, worker in ipairs(call('ZRANGE', R .. ':workers', 0, -1)) do
    for _, id in ipairs(call('SMEMBERS', R .. ':h:' .. worker)) do
      local f = call('HMGET', jkey(id), 'n', 'q', 'a')
      local number = tonumber(f[1] or -1)
      if number >= 0 and (below < 0 or number < below) and (queue == '' and f[2] ~= CALLBACKS or f[2] == queue)
        and (actor == '' or f[3] == actor) and (till < 0 or created(id) <= till) then
        found[#found + 1] = { id, number }
      end
    end
  end
end

local function matches(name)
  local state, in_queue, lane = string.match(name, '^(.):([^:]*):(.*)$')
  if state == 'i' then state = 'q' end
  if queue == '' and in_queue == CALLBACKS then return false end
  return string.find(states, state, 1, true) and (queue == '' or in_queue == queue)
    and (actor == '' or lane == actor or string.sub(lane, 1, #actor + 1) == actor .. '|')
end

local function from_shelves()
  for _, name in ipairs(call('SMEMBERS', R .. ':shelves')) do
    if matches(name) then
      local key = R .. ':s:' .. name
      local state = string.sub(name, 1, 1)
      if state == 'q' or state == 'i' then
        gather_waiting(key)
      else
        gather(key, 0, 0, call('ZCARD', key))
      end
    end
  end
  if string.find(states, 'r', 1, true) then
    gather_running()
  end
end

-- A tag's jobs are of any state: look at a bounded number of them a call.
local function from_tag()
  local key = R .. ':tag:' .. tag
  local top = below >= 0 and '(' .. string.format('%.0f', below) or '+inf'
  local page = call('ZREVRANGEBYSCORE', key, top, '-inf', 'WITHSCORES', 'LIMIT', 0, 1000)
  for i = 1, #page, 2 do
    local f = call('HMGET', jkey(page[i]), 's', 'q', 'a')
    if f[1] and string.find(states, f[1], 1, true) and (queue == '' or f[2] == queue) and (actor == '' or f[3] == actor)
      and (till < 0 or created(page[i]) <= till) then
      found[#found + 1] = { page[i], tonumber(page[i + 1]) }
    end
  end
  return #page >= 2000 and tonumber(page[#page]) or -1
end

local scanned_to = -1
if tag ~= '' then scanned_to = from_tag() else from_shelves() end
table.sort(found, function(a, b) return a[2] > b[2] end)
local records, next_below = {}, scanned_to
for i, item in ipairs(found) do
  if i > limit then
    next_below = found[limit][2]
    break
  end
  local fields = call('HGETALL', jkey(item[1]))
  if since >= 0 and created(item[1]) < since then
    next_below = -1
    break
  end
  records[#records + 1] = { item[1], fields }
end
return { next_below, records }
