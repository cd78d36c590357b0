#!lua flags=no-writes
-- Ids of dead jobs, the latest death first. ARGV: reason, actor, queue ('' any), how long ago in ms they died at least
-- and at most (-1 any), where to go on (time of death in ms, -1 from the start, and id), how many to find, how many to
-- look at.
-- Returns ids and times of death, flat, and the time and id to go on from ('' both: that was all).
local reason, actor, queue = ARGV[1], ARGV[2], ARGV[3]
local at_least, at_most, from, from_id = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6]), ARGV[7]
local wanted, looks = tonumber(ARGV[8]), tonumber(ARGV[9])
local key = R .. ':dead'

-- Of these only who asks for this queue wants to hear.
local CALLBACKS = 'mlqueue.callbacks'

local function score(number)
  return string.format('%.0f', number)
end

-- As the server sorts members of one score: by their bytes. The language's own comparison follows the locale.
local function before(a, b)
  for i = 1, math.min(#a, #b) do
    local x, y = string.byte(a, i), string.byte(b, i)
    if x ~= y then
      return x < y
    end
  end
  return #a < #b
end

-- The rank, counted from the latest, of the first behind the place to go on from; what stood there may be gone.
local function behind()
  local low = call('ZCOUNT', key, '(' .. score(from), '+inf')
  local high = low + call('ZCOUNT', key, score(from), score(from))
  while low < high do
    local middle = math.floor((low + high) / 2)
    if before(call('ZREVRANGE', key, middle, middle)[1], from_id) then high = middle else low = middle + 1 end
  end
  return low
end

local newest = at_least < 0 and '+inf' or score(NOW - at_least)
local first = at_least < 0 and 0 or call('ZCOUNT', key, '(' .. newest, '+inf')
local last = at_most < 0 and call('ZCARD', key) or call('ZCOUNT', key, score(NOW - at_most), '+inf')
if from >= 0 then
  first = math.max(first, behind())
end

local function matches(id)
  local f = call('HMGET', jkey(id), 'q', 'a', 'g')
  return (queue == '' and f[1] ~= CALLBACKS or f[1] == queue) and (actor == '' or f[2] == actor)
    and (reason == '' or f[3] == reason)
end

if first >= last then
  return { {}, '', '' }
end
local page = call('ZREVRANGE', key, first, math.min(first + looks, last) - 1, 'WITHSCORES')
local found, seen = {}, 0
for i = 1, #page, 2 do
  if #found >= 2 * wanted then
    break
  end
  seen = seen + 1
  if matches(page[i]) then
    found[#found + 1] = page[i]
    found[#found + 1] = page[i + 1]
  end
end
if first + seen >= last then
  return { found, '', '' }
end
return { found, page[2 * seen], page[2 * seen - 1] }
