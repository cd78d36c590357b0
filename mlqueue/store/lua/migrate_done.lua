#!lua flags=allow-oom
-- Forgets jobs that have arrived elsewhere, with their chunks; or, made again here, only that they were on their way.
-- ARGV: token of who migrates, 1 when the chunks are to go, then ids. Returns how many there were.
if call('GET', R .. ':mig:own') ~= ARGV[1] then
  return redis.error_reply('ERR another migration has taken over')
end
local gone = 0
for i = 3, #ARGV do
  local id = ARGV[i]
  local packed = call('GET', R .. ':mig:j:' .. id)
  local chunks = packed and ARGV[2] == '1' and cmsgpack.unpack(packed)[7] or {}
  for c = 1, #chunks, 2 do
    for number = 0, chunks[c + 1] - 1 do
      call('UNLINK', R .. ':x:' .. id .. ':' .. chunks[c] .. ':' .. number)
    end
  end
  call('UNLINK', R .. ':mig:j:' .. id)
  gone = gone + call('SREM', R .. ':mig', id)
end
return gone
