#!lua flags=allow-oom
-- Forgets what is kept under a key. ARGV: key (quoted). Returns 1, or 0 when there was nothing.
local key = R .. ':data:' .. ARGV[1]
local before = call('HMGET', key, 'n', 'g')
for i = 0, tonumber(before[1] or 0) - 1 do
  call('UNLINK', key .. ':' .. before[2] .. ':' .. i)
end
return call('UNLINK', key)
