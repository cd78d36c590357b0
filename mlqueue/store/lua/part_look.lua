-- Reading a job.

local function position(rec)
  if rec.state ~= 'q' then
    return -1
  end
  local ahead, score = 0, rec.priority * PRIORITY + rec.number
  local queue = ':' .. rec.queue .. ':'
  for _, name in ipairs(call('SMEMBERS', R .. ':shelves')) do
    local state = string.sub(name, 1, 1)
    if (state == 'q' or state == 'i') and string.sub(name, 2, 1 + #queue) == queue then
      ahead = ahead + call('ZCOUNT', R .. ':s:' .. name, '-inf', '(' .. string.format('%.0f', score))
    end
  end
  return ahead
end

-- What there is of a job: false, or fields (flat), body, result (flat), error, attempts, position (-1 unless queued),
-- callback (flat), tries to deliver it. `what` says which of these are wanted, by letters: b body, s short result, r whole
-- result, e error, a attempts, p position, c callback.
local function look(id, what)
  local function wants(letter)
    return string.find(what, letter, 1, true) ~= nil
  end
  -- A key of another type than ours is as good as none: one broken job must not hide the others.
  local function result()
    local found = {}
    if wants('r') then
      found = redis.pcall('HGETALL', R .. ':r:' .. id)
    elseif wants('s') then
      local f = redis.pcall('HMGET', R .. ':r:' .. id, 's', 'c')
      found = f[1] and { 's', f[1], 'c', f[2] } or {}
    end
    return found.err and {} or found
  end
  local fields = call('HGETALL', jkey(id))
  return #fields > 0 and {
    fields,
    wants('b') and call('GET', R .. ':b:' .. id) or '',
    result(),
    wants('e') and call('GET', R .. ':e:' .. id) or '',
    wants('a') and call('LRANGE', R .. ':at:' .. id, 0, -1) or {},
    wants('p') and position(load(id)) or -1,
    wants('c') and call('HGETALL', R .. ':cb:' .. id) or {},
    wants('c') and call('LRANGE', R .. ':ca:' .. id, 0, -1) or {},
  }
end
