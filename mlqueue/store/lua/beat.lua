#!lua flags=allow-oom
-- Renews the leases of workers. ARGV: lease in ms, then the workers. Returns how many jobs wait to be run
-- alone, of whatever lane: a supervisor then starts a child for them, less and less often when it gets none.
for i = 2, #ARGV do
  call('ZADD', R .. ':workers', NOW + tonumber(ARGV[1]), ARGV[i])
end
local waiting = 0
for _, name in ipairs(call('SMEMBERS', R .. ':shelves')) do
  if string.sub(name, 1, 2) == 'i:' then
    waiting = waiting + call('ZCARD', R .. ':s:' .. name)
  end
end
return waiting
