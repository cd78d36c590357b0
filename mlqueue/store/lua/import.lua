#!lua
-- parts: events queue limits moves create
-- Creates dead jobs, as they were exported. ARGV: how long dead jobs are kept in ms (-1: for ever), then one packed item
-- each: the job (as `create` takes it), further fields of its record (flat), when it died in ms, its error, its attempts
-- (each packed), and, if it has one, its checkpoint: size, value, number of chunks (0: the value is here), generation.
-- Returns for each 1 (created), 0 (the id exists) or the error's text.
local ttl = tonumber(ARGV[1])

local function import(item)
  local new, fields, died, err, attempts, ck = unpack(item)
  -- All of it before anything is written: a job that was half made would run.
  assert(type(fields) == 'table' and #fields % 2 == 0 and type(died) == 'number' and type(err) == 'string'
    and type(attempts) == 'table', 'malformed dead letter')
  for _, value in ipairs(fields) do
    assert(type(value) == 'string' or type(value) == 'number', 'malformed field')
  end
  for _, attempt in ipairs(attempts) do
    assert(type(attempt) == 'string', 'malformed attempt')
  end
  assert(not ck or type(ck[1]) == 'number' and type(ck[2]) == 'string' and type(ck[3]) == 'number'
    and type(ck[4]) == 'string', 'malformed checkpoint')
  local id = new[1]
  if create(new) == 0 then
    return 0
  end
  -- It has died elsewhere: there is no end here to be counted, or to be called back for.
  local rec = load(id)
  unshelve(rec.state, rec, id)
  call('SET', R .. ':e:' .. id, err)
  for _, attempt in ipairs(attempts) do
    call('RPUSH', R .. ':at:' .. id, attempt)
  end
  shelve('d', rec, id)
  call('ZREM', R .. ':qt', id)
  -- The next sweep must not take at once what somebody has just brought back.
  call('ZADD', R .. ':dead', ttl >= 0 and NOW - died >= ttl and NOW or died, id)
  if ck then
    for i = 0, ck[3] - 1 do
      call('PERSIST', R .. ':x:' .. id .. ':c' .. ck[4] .. ':' .. i)
    end
    local where, what = ck[3] > 0 and 'n' or 'v', ck[3] > 0 and ck[3] or ck[2]
    call('HSET', R .. ':ck:' .. id, where, what, 'g', ck[4], 'z', ck[1])
    call('HSET', jkey(id), 'K', 1)
  end
  local n = #fields
  fields[n + 1], fields[n + 2], fields[n + 3], fields[n + 4] = 'f', died, 's', 'd'
  call('HSET', jkey(id), unpack(fields))
  emit('state', id)
  return 1
end

local answer = {}
for i = 2, #ARGV do
  local well, made = pcall(function() return import(cmsgpack.unpack(ARGV[i])) end)
  answer[i - 1] = well and made or 'error ' .. tostring(type(made) == 'table' and made.err or made)
end
return answer
