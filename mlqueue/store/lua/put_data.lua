#!lua
-- Keeps data under a key, instead of what was there. ARGV: key (quoted), generation, size, value, number of chunks
-- (0: the value is in ARGV), expiry in ms (-1: none).
local key, generation, n, expiry = R .. ':data:' .. ARGV[1], ARGV[2], tonumber(ARGV[5]), tonumber(ARGV[6])
local before = call('HMGET', key, 'n', 'g')
if before[2] == generation then
  return 1 -- it is there; only the answer was lost
end
for i = 0, n - 1 do
  if call('EXISTS', key .. ':' .. generation .. ':' .. i) == 0 then
    return redis.error_reply('chunk ' .. i .. ' of the data is gone')
  end
end
for i = 0, tonumber(before[1] or 0) - 1 do
  call('UNLINK', key .. ':' .. before[2] .. ':' .. i)
end
call('UNLINK', key)
local function keep(one)
  if expiry >= 0 then
    call('PEXPIRE', one, expiry)
  else
    call('PERSIST', one)
  end
end
if n > 0 then
  for i = 0, n - 1 do
    keep(key .. ':' .. generation .. ':' .. i)
  end
  call('HSET', key, 'n', n, 'g', generation, 'z', ARGV[3])
else
  call('HSET', key, 'v', ARGV[4], 'g', generation, 'z', ARGV[3])
end
keep(key)
call('ZREMRANGEBYSCORE', R .. ':datas', '-inf', '(' .. NOW)
call('ZADD', R .. ':datas', expiry >= 0 and NOW + expiry or '+inf', ARGV[1])
return 1
