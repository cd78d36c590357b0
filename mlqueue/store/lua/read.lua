#!lua flags=no-writes
-- parts: events queue moves
-- Reads records. ARGV: what (any of b body, s short result, r whole result, e error, a attempts, p position, c callback,
-- n newest event), then ids.
-- Returns for each false, or fields (flat), body, result (flat), error, attempts, position (-1 unless queued), callback
-- (flat), tries to deliver it; with n the id of the newest event behind them: the record is as it left it.
local what = ARGV[1]
local function wants(letter)
  return string.find(what, letter, 1, true) ~= nil
end

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

-- A key of another type than ours is as good as none: one broken job must not hide the others.
local function result(id)
  local found = {}
  if wants('r') then
    found = redis.pcall('HGETALL', R .. ':r:' .. id)
  elseif wants('s') then
    local f = redis.pcall('HMGET', R .. ':r:' .. id, 's', 'c')
    found = f[1] and { 's', f[1], 'c', f[2] } or {}
  end
  return found.err and {} or found
end

local answer = {}
for i = 2, #ARGV do
  local id = ARGV[i]
  local fields = call('HGETALL', jkey(id))
  if #fields == 0 then
    answer[#answer + 1] = false
  else
    answer[#answer + 1] = {
      fields,
      wants('b') and call('GET', R .. ':b:' .. id) or '',
      result(id),
      wants('e') and call('GET', R .. ':e:' .. id) or '',
      wants('a') and call('LRANGE', R .. ':at:' .. id, 0, -1) or {},
      wants('p') and position(load(id)) or -1,
      wants('c') and call('HGETALL', R .. ':cb:' .. id) or {},
      wants('c') and call('LRANGE', R .. ':ca:' .. id, 0, -1) or {},
    }
  end
end
if wants('n') then
  local newest = redis.pcall('XREVRANGE', R .. ':ev', '+', '-', 'COUNT', 1)[1]
  answer[#answer + 1] = newest and newest[1] or '0-0'
end
return answer
