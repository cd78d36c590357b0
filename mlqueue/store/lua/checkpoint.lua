#!lua
-- parts: events counts queue moves ends
-- Saves a checkpoint. ARGV: id, attempt, size, value, number of chunks (0: the value is in ARGV), generation.
-- Returns 1 (saved), 0 (stale), 2 (saved, and cancelling has been asked for).
local id = ARGV[1]
local rec = load(id)
if not rec or rec.state ~= 'r' or rec.attempt ~= tonumber(ARGV[2]) then
  return 0
end
if call('HGET', R .. ':ck:' .. id, 'g') == ARGV[6] then
  return rec.cancel and 2 or 1 -- it has been saved; only the answer was lost
end
local n = tonumber(ARGV[5])
for i = 0, n - 1 do
  if call('EXISTS', R .. ':x:' .. id .. ':c' .. ARGV[6] .. ':' .. i) == 0 then
    return redis.error_reply('chunk ' .. i .. ' of the checkpoint is gone')
  end
end
for i = 0, n - 1 do
  call('PERSIST', R .. ':x:' .. id .. ':c' .. ARGV[6] .. ':' .. i)
end
drop_checkpoint(id)
if n > 0 then
  call('HSET', R .. ':ck:' .. id, 'n', n, 'g', ARGV[6], 'z', ARGV[3], 'a', ARGV[2], 't', NOW)
else
  call('HSET', R .. ':ck:' .. id, 'v', ARGV[4], 'g', ARGV[6], 'z', ARGV[3], 'a', ARGV[2], 't', NOW)
end
call('HSET', jkey(id), 'K', 1)
return rec.cancel and 2 or 1
