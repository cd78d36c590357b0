#!lua
-- parts: events counts queue limits moves ends
-- Puts ended jobs back at the end of their queues, their counts at nought; their attempts go on. ARGV: nonce, states that
-- they may be in (letters), then id and body ('' as it is) of each.
-- Returns for each the state that it was in (it is as it was if that is none of those), false when there is no such job,
-- "only" and the id of the job that its unique key leads to, or the error's text.
local nonce, states = ARGV[1], ARGV[2]

-- The chunks of a body, where it stands for some.
local function each_chunk(id, body, act)
  if body and string.sub(body, 1, 4) == '\193MQa' then
    local ref = cmsgpack.unpack(string.sub(body, 5))
    for i = 0, ref[2] - 1 do
      act(R .. ':x:' .. id .. ':a' .. ref[1] .. ':' .. i)
    end
  end
end

local function replace_body(id, body)
  each_chunk(id, call('HGET', jkey(id), 'b'), function(key) call('UNLINK', key) end)
  if #body <= 64 then
    call('HSET', jkey(id), 'b', body)
    call('UNLINK', R .. ':b:' .. id)
  else
    call('SET', R .. ':b:' .. id, body)
    call('HDEL', jkey(id), 'b')
  end
end

local function retry(id, body)
  local rec = load(id)
  if not rec then
    return false
  end
  if call('HGET', jkey(id), 'M') == nonce then
    return string.sub(states, 1, 1) -- it has been done; only the answer was lost
  end
  if not string.find(states, rec.state, 1, true) then
    return rec.state
  end
  each_chunk(id, body, function(key)
    assert(call('EXISTS', key) == 1, 'a chunk of the arguments is gone')
  end)
  local key = call('HGET', jkey(id), 'D')
  if key then
    local unique = R .. ':uk:' .. rec.actor .. ':' .. key
    local other = call('GET', unique)
    local beside = other and other ~= id and load(other)
    if beside and not ENDED[beside.state] then
      return 'only ' .. other
    end
    call('SET', unique, id)
  end
  each_chunk(id, body, function(key) call('PERSIST', key) end)
  local was = rec.state
  unshelve(was, rec, id)
  call('ZREM', R .. ':exp', id)
  call('ZREM', R .. ':dead', id)
  drop_result(id)
  call('UNLINK', R .. ':e:' .. id)
  call('HDEL', jkey(id), 'x', 'y', 'z', 'g', 'c', 'f', 'i', 'r', 'v', 'V', 'd', 'h', 'O')
  if body ~= '' then
    replace_body(id, body)
  end
  rec.number = call('INCR', R .. ':seq')
  rec.crashes, rec.alone = 0, nil
  local tags = call('HGET', jkey(id), 'G')
  if tags then
    for _, tag in ipairs(cmsgpack.unpack(tags)) do
      call('ZADD', R .. ':tag:' .. tag, rec.number, id)
    end
  end
  local fields = { 'n', rec.number, 'N', NOW, 'M', nonce }
  local patience = call('HGET', jkey(id), 'Q')
  if patience then
    fields[7], fields[8] = 'U', NOW + patience
    call('ZADD', R .. ':qt', NOW + patience, id)
  end
  requeue(id, rec, fields)
  return was
end

local answer = {}
for i = 3, #ARGV, 2 do
  local well, was = pcall(retry, ARGV[i], ARGV[i + 1])
  -- One broken record must not hold up the others.
  answer[#answer + 1] = well and was or not well and 'error ' .. tostring(type(was) == 'table' and was.err or was)
end
return answer
