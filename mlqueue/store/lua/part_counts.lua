-- Counting what happens, for who watches it over time (mlqueue.web.metrics). Gathered, and written once a call. There are
-- few functions here because each is made anew at every call.

local counts, bounds = nil, nil

local function count(name, number)
  counts = counts or {}
  counts[name] = (counts[name] or 0) + (number or 1)
end

-- How long jobs of an actor waited, and how long they ran: by actor the sum in ms, and the number in each bucket.
local waits, runs = nil, nil

-- Notes a time; returns what it gathers into.
local function observe(into, actor, ms)
  -- The upper bounds of the buckets in ms, as BOUNDS in mlqueue/store/events.py.
  bounds = bounds or { 10, 50, 100, 500, 1000, 5000, 10000, 30000, 60000, 300000, 900000, 3600000, 14400000, 43200000,
    86400000, math.huge }
  local i = 1
  while ms > bounds[i] do
    i = i + 1
  end
  into = into or {}
  local times = into[actor]
  if not times then
    times = { sum = 0 }
    into[actor] = times
  end
  times.sum = times.sum + ms
  times[i] = (times[i] or 0) + 1
  return into
end

-- Whatever is wrong with the counters, the jobs go on.
local function write_counts()
  for what, by_actor in pairs({ w = waits, r = runs }) do
    for actor, times in pairs(by_actor) do
      for bucket, number in pairs(times) do
        count(what .. ':' .. actor .. ':' .. (bounds[bucket] or bucket), number)
      end
    end
  end
  if not counts then
    return
  end
  local names, key = {}, R .. ':m'
  for name in pairs(counts) do
    names[#names + 1] = name
  end
  local known, values, room = redis.pcall('HMGET', key, unpack(names)), {}, nil
  for i, name in ipairs(names) do
    if not known[i] and not room then
      -- How many there may be is bounded: names of actors come from outside.
      room = 20000 - (tonumber(redis.pcall('HLEN', key)) or 0)
      -- A value of more than 64 bytes makes a table of it: in a list each name would be looked for among all.
      redis.pcall('HSETNX', key, 'about', string.rep('-', 65))
    end
    if known[i] or room > 0 then
      room = room and not known[i] and room - 1 or room
      values[#values + 1] = name
      values[#values + 1] = (tonumber(known[i]) or 0) + counts[name]
    end
  end
  if values[1] then
    redis.pcall('HSET', key, unpack(values))
  end
  counts, waits, runs = nil, nil, nil
end
