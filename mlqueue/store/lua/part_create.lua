-- Creating jobs.

-- part_unique.lua
local claim_unique = nil

-- A body of more bytes has a key of its own.
local INLINE = 64

-- Of how many jobs that it submitted a job knows.
local CHILDREN = 1000

-- How a body begins that stands for chunks: generation, number and size follow (MessagePack).
local IN_CHUNKS = '\193MQa'

-- item: id, queue, actor, lane, priority, delay (-1: none), due (-1: none), body, ttl, parent, tags, most crashes,
-- most stalls, callback's URL, timeout in ms, queue timeout in ms (counted from when the job is due), group (its
-- concurrency key, "/", what it takes turns by), unique (key, how long it is unique, what to do with another). With a
-- webhook, instead of the callback's URL: that or false, the URL of the webhook, its events (letters), the shortest time
-- between two events of progress in ms.
-- Returns 1, or 0 when the id exists already (then nothing changes: submitting is idempotent), or what `claim_unique`
-- says.
local function create(item)
  local id, queue, actor, lane, priority = item[1], item[2], item[3], item[4], item[5]
  local delay, due, body, ttl, tags = item[6], item[7], item[8], item[9], item[11]
  assert(type(id) == 'string' and type(queue) == 'string' and type(actor) == 'string' and type(lane) == 'string'
    and type(priority) == 'number' and type(delay) == 'number' and type(due) == 'number' and type(body) == 'string'
    and type(ttl) == 'number', 'malformed job')
  local key = jkey(id)
  if call('EXISTS', key) == 1 then
    return 0
  end
  local ref = string.sub(body, 1, 4) == IN_CHUNKS and cmsgpack.unpack(string.sub(body, 5))
  for i = 0, ref and ref[2] - 1 or -1 do
    assert(call('EXISTS', R .. ':x:' .. id .. ':a' .. ref[1] .. ':' .. i) == 1, 'a chunk of the arguments is gone')
  end
  local only = item[18] and claim_unique(item)
  if only then
    return only
  end
  for i = 0, ref and ref[2] - 1 or -1 do
    call('PERSIST', R .. ':x:' .. id .. ':a' .. ref[1] .. ':' .. i)
  end
  local rec = {
    state = '-', queue = queue, actor = actor, lane = lane, priority = priority, number = call('INCR', R .. ':seq'),
    crashes = 0,
  }
  local fields = { 'q', queue, 'a', actor, 'n', rec.number, 't', NOW, 'T', ttl }
  local function also(name, value)
    fields[#fields + 1] = name
    fields[#fields + 1] = value
  end
  if lane ~= actor then also('l', lane) end
  if priority ~= 0 then also('p', priority) end
  if item[10] and item[10] ~= '' then
    also('P', item[10])
    if queue ~= CALLBACKS and call('EXISTS', jkey(item[10])) == 1 then
      call('RPUSH', R .. ':ch:' .. item[10], id)
      call('LTRIM', R .. ':ch:' .. item[10], -CHILDREN, -1)
    end
  end
  if item[12] then also('X', item[12]) end
  if item[13] then also('Z', item[13]) end
  if type(item[14]) == 'table' then
    local url, webhook, events, every = unpack(item[14])
    assert(type(webhook) == 'string' and type(events) == 'string' and type(every) == 'number', 'malformed webhook')
    call('HSET', R .. ':cb:' .. id, 'w', webhook, 'e', events, 'm', every)
    if url then
      call('HSET', R .. ':cb:' .. id, 'u', url)
    end
    also('C', (url and '1' or '') .. events)
  elseif item[14] then
    call('HSET', R .. ':cb:' .. id, 'u', item[14])
    also('C', 1)
  end
  if item[15] then also('J', item[15]) end
  if item[17] then
    rec.group = item[17]
    also('E', item[17])
  end
  if item[18] then also('D', item[18][1]) end
  if #body <= INLINE then
    also('b', body)
  else
    call('SET', R .. ':b:' .. id, body)
  end
  if tags and #tags > 0 then
    also('G', cmsgpack.pack(tags))
    for _, tag in ipairs(tags) do
      call('ZADD', R .. ':tag:' .. tag, rec.number, id)
    end
  end
  if delay >= 0 then
    due = NOW + delay
  end
  if item[16] then
    also('Q', item[16])
    also('U', math.max(due, NOW) + item[16])
    call('ZADD', R .. ':qt', math.max(due, NOW) + item[16], id)
  end
  if due > NOW then
    schedule(id, rec, due, fields)
  else
    requeue(id, rec, fields)
  end
  return 1
end
