#!lua
-- parts: events queue limits
-- Makes jobs that migrate_out has taken off in another store, as they were there, behind those that are here. ARGV: the
-- store that they come from, token of who migrates, then what they were.
-- Returns for each 1 (it is here, from now or before), 0 (another job has its id), or the error's text.
local from, arrived = ARGV[1], R .. ':mig:in:' .. ARGV[1]
if call('GET', R .. ':mig:own' .. from) ~= ARGV[2] then
  return redis.error_reply('ERR another migration has taken over')
end

-- Fields that say where a job stood there, or what only its calls there knew.
local NOT_KEPT = { s = true, n = true, W = true, A = true, i = true, M = true, Y = true, H = true, q = true, a = true, l = true }

local WRITE = { s = 'SET', h = 'HSET', l = 'RPUSH' }

local function make(item)
  local id, state, flat, beside, expires, died, chunks = unpack(item)
  if call('SISMEMBER', arrived, id) == 1 then
    return 1
  end
  if call('EXISTS', jkey(id)) == 1 then
    return 0
  end
  for i = 1, #chunks, 2 do
    for number = 0, chunks[i + 1] - 1 do
      call('PERSIST', R .. ':x:' .. id .. ':' .. chunks[i] .. ':' .. number)
    end
  end
  local f, fields = {}, {}
  for i = 1, #flat, 2 do
    f[flat[i]] = flat[i + 1]
    if not NOT_KEPT[flat[i]] then
      fields[#fields + 1], fields[#fields + 2] = flat[i], flat[i + 1]
    end
  end
  local rec = {
    state = '-', queue = f.q, actor = f.a, lane = f.l or f.a, priority = tonumber(f.p or 0),
    number = call('INCR', R .. ':seq'), crashes = tonumber(f.x or 0),
  }
  for name, value in pairs(beside) do
    local key = R .. ':' .. name .. ':' .. id
    call('UNLINK', key)
    if type(value[2]) == 'table' then
      for first = 1, #value[2], 1000 do -- a log may have more lines than a call takes arguments
        call(WRITE[value[1]], key, unpack(value[2], first, math.min(first + 999, #value[2])))
      end
    else
      call(WRITE[value[1]], key, value[2])
    end
  end
  for _, tag in ipairs(f.G and cmsgpack.unpack(f.G) or {}) do
    call('ZADD', R .. ':tag:' .. tag, rec.number, id)
  end
  call('HSET', jkey(id), 'q', f.q, 'a', f.a, 'n', rec.number, unpack(fields))
  if f.l then
    call('HSET', jkey(id), 'l', f.l)
  end
  call('SADD', arrived, id)
  if (state == 'q' or state == 'w') and tonumber(f.U) then
    call('ZADD', R .. ':qt', f.U, id)
  end
  if f.D then
    -- The key leads to the job that came with it last, which may have arrived before.
    local unique = R .. ':uk:' .. f.a .. ':' .. f.D
    local other = call('GET', unique)
    local since = other and call('HMGET', jkey(other), 'N', 't')
    if not since or tonumber(since[1] or since[2] or 0) <= tonumber(f.N or f.t) then
      call('SET', unique, id)
    end
  end
  if state == 'q' then
    requeue(id, rec, {})
  elseif state == 'w' then
    schedule(id, rec, tonumber(f.d), {})
  else
    shelve(state, rec, id)
    if expires >= 0 then call('ZADD', R .. ':exp', expires, id) end
    if died >= 0 then call('ZADD', R .. ':dead', died, id) end
    call('HSET', jkey(id), 's', state)
    emit('state', id)
  end
  return 1
end

local answer = {}
for i = 3, #ARGV do
  local well, made = pcall(function() return make(cmsgpack.unpack(ARGV[i])) end)
  answer[#answer + 1] = well and made or 'error ' .. tostring(type(made) == 'table' and made.err or made)
end
return answer
