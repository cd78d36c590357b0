#!lua flags=allow-oom
-- Forgets what is kept under keys. ARGV: keys (quoted). Returns under how many there was something.
local gone = 0
for _, name in ipairs(ARGV) do
  local key = R .. ':data:' .. name
  local before = call('HMGET', key, 'n', 'g')
  for i = 0, tonumber(before[1] or 0) - 1 do
    call('UNLINK', key .. ':' .. before[2] .. ':' .. i)
  end
  gone = gone + call('UNLINK', key)
  call('ZREM', R .. ':datas', name)
end
return gone
