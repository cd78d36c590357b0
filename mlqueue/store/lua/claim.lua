#!lua flags=allow-oom
-- parts: events counts queue moves start
-- Starts callbacks that wait, for a worker. ARGV: worker, nonce, how many. Returns the jobs.
local worker, nonce = ARGV[1], ARGV[2]
local wkey, held = R .. ':w:' .. worker, R .. ':h:' .. worker
local known = call('HMGET', wkey, 'info', 'dn', 'dj')
if not known[1] then
  return {}
end
if known[2] == nonce then
  hand_over_again(known[3], worker)
  return jobs
end
local shelf = R .. ':s:q:' .. CALLBACKS .. ':' .. CALLBACK
for _, id in ipairs(call('ZRANGE', shelf, 0, tonumber(ARGV[3]) - 1)) do
  pcall(start, id, worker)
  call('ZREM', shelf, id)
end
if ids[1] then
  call('SADD', held, unpack(ids))
end
call('HSET', wkey, 'dn', nonce, 'dj', cmsgpack.pack(given))
return jobs
