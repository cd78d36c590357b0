#!lua flags=no-writes
-- What there is to search in jobs, beside their records. ARGV: how many bytes a body may have, and how many of an error's
-- message there are at most, then ids.
-- Returns for each the body ('' for a larger one), and the type and message of the error; false where there is no job.
local most, answer = tonumber(ARGV[1]), {}
for i = 3, #ARGV do
  local id = ARGV[i]
  local f = call('HMGET', jkey(id), 's', 'b')
  local item = false
  if f[1] then
    local body = f[2] or call('STRLEN', R .. ':b:' .. id) <= most and call('GET', R .. ':b:' .. id) or ''
    local packed = call('GET', R .. ':e:' .. id)
    local error = packed and cmsgpack.unpack(packed) or { '', '' }
    item = { body, error[1], string.sub(error[2], 1, tonumber(ARGV[2])) }
  end
  answer[#answer + 1] = item
end
return answer
