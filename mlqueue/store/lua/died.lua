#!lua flags=no-writes
-- What jobs died of, without the records and the tracebacks. ARGV: how many bytes of a message at most, then ids.
-- Returns for each actor, reason, time of death in ms, and the type and message of the error; false for one that is not
-- dead.
local most, answer = tonumber(ARGV[1]), {}
for i = 2, #ARGV do
  local f = call('HMGET', jkey(ARGV[i]), 's', 'a', 'g', 'f')
  local item = false
  if f[1] == 'd' then
    local packed = call('GET', R .. ':e:' .. ARGV[i])
    local error = packed and cmsgpack.unpack(packed) or { '', '' }
    item = { f[2], f[3] or '', tonumber(f[4] or 0), error[1], string.sub(error[2], 1, most) }
  end
  answer[#answer + 1] = item
end
return answer
