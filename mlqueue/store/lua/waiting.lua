#!lua flags=no-writes
-- parts: events queue moves
-- What decides when a waiting job starts. ARGV: id.
-- Returns false when there is no such job; else its state, when it is due, now, its queue and actor, flat the lanes of its
-- queue and how many jobs there come before it, for each worker its info and flat the actors and starts of what it runs,
-- and flat actors, how long their attempts have run in all (ms), and how many there were.
local id = ARGV[1]
local rec = load(id)
if not rec then
  return false
end
local lanes, workers, times, asked = {}, {}, {}, {}

local function ask(actor)
  if not asked[actor] then
    asked[actor] = true
    local names = { 'sum', '10', '50', '100', '500', '1000', '5000', '10000', '30000', '60000', '300000', '900000',
      '3600000', '14400000', '43200000', '86400000', 'inf' }
    for i, name in ipairs(names) do
      names[i] = 'r:' .. actor .. ':' .. name
    end
    local values, number = redis.pcall('HMGET', R .. ':m', unpack(names)), 0
    for i = 2, #names do
      number = number + tonumber(values[i] or 0)
    end
    times[#times + 1], times[#times + 2], times[#times + 3] = actor, tonumber(values[1] or 0), number
  end
end

if rec.state == 'q' then
  local score = string.format('(%.0f', rec.priority * PRIORITY + rec.number)
  for _, name in ipairs(call('SMEMBERS', R .. ':shelves')) do
    local state, queue, lane = string.match(name, '^(.):([^:]*):(.*)$')
    if (state == 'q' or state == 'i') and queue == rec.queue then
      local before = call('ZCOUNT', R .. ':s:' .. name, '-inf', score)
      if before > 0 then
        local actor = string.match(lane, '^[^|]*')
        lanes[#lanes + 1], lanes[#lanes + 2] = actor, before
        ask(actor)
      end
    end
  end
  for _, worker in ipairs(call('ZRANGEBYSCORE', R .. ':workers', NOW, '+inf')) do
    local held = {}
    for _, other in ipairs(call('SMEMBERS', R .. ':h:' .. worker)) do
      local f = call('HMGET', jkey(other), 'a', 'u', 'q')
      if f[1] and f[3] ~= CALLBACKS then
        held[#held + 1], held[#held + 2] = f[1], tonumber(f[2] or NOW)
        ask(f[1])
      end
    end
    workers[#workers + 1] = { call('HGET', R .. ':w:' .. worker, 'info') or '', held }
  end
end
return { rec.state, tonumber(call('HGET', jkey(id), 'd') or 0), NOW, rec.queue, rec.actor, lanes, workers, times }
