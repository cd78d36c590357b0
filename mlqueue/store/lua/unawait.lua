#!lua flags=allow-oom
-- A job waits for no other any more. ARGV: id, attempt.
local f = call('HMGET', jkey(ARGV[1]), 's', 'k')
if f[1] == 'r' and f[2] == ARGV[2] then
  call('HDEL', jkey(ARGV[1]), 'A')
end
return 1
