#!lua flags=allow-oom
-- parts: events queue limits moves
-- Takes jobs off, to be made again in another store: from here on nobody starts, changes or sees them, and what they
-- were stands in R:mig:j:ID until they have arrived. ARGV: token of who migrates, how many bytes are enough for one
-- answer, then ids. Returns a list of each that was taken: id, what it was (MessagePack), and of each of its blobs in
-- chunks what they are and how many. Callbacks that wait for a job come with it, behind it.
if call('GET', R .. ':mig:own') ~= ARGV[1] then
  return redis.error_reply('ERR another migration has taken over')
end

-- What belongs to a job beside its record; chunks are named by these and stay where they are.
local BESIDE = { 'b', 'r', 'e', 'at', 'ck', 'cb', 'ca', 'lg', 'me', 'ch' }

-- What running jobs need here: those that they wait for, and the jobs of callbacks that are being delivered.
local needed = {}
for _, worker in ipairs(call('ZRANGE', R .. ':workers', 0, -1)) do
  for _, id in ipairs(call('SMEMBERS', R .. ':h:' .. worker)) do
    local f = call('HMGET', jkey(id), 'A', 'q', 'P')
    if f[1] then needed[f[1]] = true end
    if f[2] == CALLBACKS and f[3] then needed[f[3]] = true end
  end
end

-- The callbacks that wait, by their jobs.
local callbacks = {}
for _, name in ipairs(call('SMEMBERS', R .. ':shelves')) do
  if string.match(name, '^[qwi]:([^:]*):') == CALLBACKS then
    for _, id in ipairs(call('ZRANGE', R .. ':s:' .. name, 0, -1)) do
      local parent = call('HGET', jkey(id), 'P')
      if parent then
        callbacks[parent] = callbacks[parent] or {}
        table.insert(callbacks[parent], id)
      end
    end
  end
end

local function value_of(key)
  local kind = call('TYPE', key).ok
  if kind == 'string' then return { 's', call('GET', key) } end
  if kind == 'hash' then return { 'h', call('HGETALL', key) } end
  if kind == 'list' then return { 'l', call('LRANGE', key, 0, -1) } end
end

local function chunks_of(id)
  local found = {}
  local function add(what, number)
    found[#found + 1], found[#found + 2] = what, tonumber(number)
  end
  local r = redis.pcall('HMGET', R .. ':r:' .. id, 'n', 'k')
  if not r.err and r[1] then add('r' .. r[2], r[1]) end
  local ck = redis.pcall('HMGET', R .. ':ck:' .. id, 'n', 'g')
  if not ck.err and ck[1] then add('c' .. ck[2], ck[1]) end
  local body = call('HGET', jkey(id), 'b')
  if body and string.sub(body, 1, 4) == '\193MQa' then
    local ref = cmsgpack.unpack(string.sub(body, 5))
    add('a' .. ref[1], ref[2])
  end
  return found
end

local answer, size = {}, 0

local function take(id, rec)
  local beside, chunks = {}, chunks_of(id)
  for _, name in ipairs(BESIDE) do
    beside[name] = value_of(R .. ':' .. name .. ':' .. id)
  end
  local tags, unique = unpack(call('HMGET', jkey(id), 'G', 'D'))
  unique = unique and R .. ':uk:' .. rec.actor .. ':' .. unique
  if unique and call('GET', unique) == id then
    call('UNLINK', unique)
  end
  local packed = cmsgpack.pack({ id, rec.state, call('HGETALL', jkey(id)), beside,
    tonumber(call('ZSCORE', R .. ':exp', id) or -1), tonumber(call('ZSCORE', R .. ':dead', id) or -1), chunks })
  call('SET', R .. ':mig:j:' .. id, packed)
  call('SADD', R .. ':mig', id)
  unshelve(rec.state, rec, id)
  unshelve('i', rec, id)
  for _, tag in ipairs(tags and cmsgpack.unpack(tags) or {}) do
    call('ZREM', R .. ':tag:' .. tag, id)
  end
  for _, name in ipairs({ 'sched', 'qt', 'exp', 'dead' }) do
    call('ZREM', R .. ':' .. name, id)
  end
  if rec.state == 'q' or rec.state == 'w' then
    emit('removed', id)
    tell(id, rec, true)
  end
  call('UNLINK', jkey(id), R .. ':wt:' .. id)
  for _, name in ipairs(BESIDE) do
    call('UNLINK', R .. ':' .. name .. ':' .. id)
  end
  size = size + #packed
  answer[#answer + 1] = { id, packed, unpack(chunks) }
end

for i = 3, #ARGV do
  local id = ARGV[i]
  if size > tonumber(ARGV[2]) then
    break
  end
  local rec = load(id)
  local kept = call('GET', R .. ':mig:j:' .. id)
  if kept then
    size = size + #kept
    answer[#answer + 1] = { id, kept, unpack(cmsgpack.unpack(kept)[7]) } -- it was taken before
  elseif rec then
    local parent = call('HGET', jkey(id), 'P')
    local at_home = parent and call('HGET', jkey(parent), 's')
    -- A callback comes with its job; a child goes when its parent has ended, which may yet wait for it.
    if rec.state ~= 'r' and not needed[id] and at_home ~= 'r' and not (at_home and rec.queue == CALLBACKS) then
      take(id, rec)
      for _, callback in ipairs(callbacks[id] or {}) do
        take(callback, load(callback))
      end
    end
  end
end
return answer
