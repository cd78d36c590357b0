-- Ends of jobs, and what goes with them.

local ENDED = { s = true, d = true, c = true }

-- What ended jobs add to the indexes is gathered, and written once a call by `write_ends`.
local ends = { shelves = {}, expiry = {}, dead = {}, held = {}, late = {} }

local function gather(into, key, ...)
  local list = into[key]
  if not list then
    list = {}
    into[key] = list
  end
  for _, value in ipairs({ ... }) do
    list[#list + 1] = value
  end
end

local function write_ends()
  for key, members in pairs(ends.held) do
    call('SREM', key, unpack(members))
  end
  for name, members in pairs(ends.shelves) do
    call('ZADD', R .. ':s:' .. name, unpack(members))
    call('SADD', R .. ':shelves', name)
  end
  for key, members in pairs(ends.expiry) do
    call('ZADD', key, unpack(members))
  end
  for key, members in pairs(ends.dead) do
    call('ZADD', key, unpack(members))
  end
  for key, members in pairs(ends.late) do
    if call('EXISTS', key) == 1 then
      call('ZREM', key, unpack(members))
    end
  end
  ends = { shelves = {}, expiry = {}, dead = {}, held = {}, late = {} }
end

local function drop_chunks(id, what, n)
  for i = 0, n - 1 do
    call('UNLINK', R .. ':x:' .. id .. ':' .. what .. ':' .. i)
  end
end

local function drop_checkpoint(id)
  local ck = call('HMGET', R .. ':ck:' .. id, 'n', 'g')
  if ck[1] then
    drop_chunks(id, 'c' .. ck[2], tonumber(ck[1]))
  end
  call('UNLINK', R .. ':ck:' .. id)
end

local function drop_result(id)
  if call('TYPE', R .. ':r:' .. id).ok == 'hash' then
    local r = call('HMGET', R .. ':r:' .. id, 'n', 'k')
    if r[1] then
      drop_chunks(id, 'r' .. r[2], tonumber(r[1]))
    end
  end
  call('UNLINK', R .. ':r:' .. id)
end

-- Ends a job. `fields` are further fields of the record, flat. The state is written last of the record.
local function finish(id, rec, state, fields, ttl)
  if rec.checkpoint and state ~= 'd' then
    drop_checkpoint(id)
    call('HDEL', jkey(id), 'K')
  end
  if rec.callback then
    call_back(id, rec, state)
  end
  local result = fields[1] == 'r' and fields[2] or ''
  local n = #fields
  fields[n + 1], fields[n + 2], fields[n + 3], fields[n + 4] = 'f', NOW, 's', state
  call('HSET', jkey(id), unpack(fields))
  if rec.queue ~= CALLBACKS then
    count('e:' .. rec.actor .. ':' .. state .. (state == 'd' and ':' .. call('HGET', jkey(id), 'g') or ''))
  end
  emit('state', id)
  gather(ends.shelves, state .. ':' .. rec.queue .. ':' .. rec.lane, rec.number, id)
  if ttl >= 0 then
    gather(ends.expiry, R .. ':exp', NOW + ttl, id)
  end
  if rec.state == 'r' then
    gather(ends.held, R .. ':h:' .. rec.worker, id)
    gather(ends.late, R .. ':late', id)
    if rec.awaits then
      call('HDEL', jkey(id), 'A')
    end
    if limits() then
      limited.free(id, rec, true)
    end
  end
  if state == 'd' then
    gather(ends.dead, R .. ':dead', NOW, id)
  end
  if rec.watched then
    call('HDEL', jkey(id), 'W')
    -- With the result, where it is small, a waiter need not ask for it.
    tell(id, rec, true, state .. result)
  end
end

-- stage: how the cancelling ended it: waiting (it never ran), raised (it was stopped), ended (it had ended by itself),
-- killed (with its process), lost (its worker was lost, or was taken from it).
local function cancelled(id, rec, stage)
  drop_result(id)
  finish(id, rec, 'c', { 'c', rec.cancel or NOW, 'h', stage }, rec.ttl)
end
