#!lua flags=allow-oom
-- Renews the leases of workers. ARGV: lease in ms, then of each worker its name and its vitals ('' where nobody measures).
-- Returns how many jobs wait to be run alone, of whatever lane: a supervisor then starts a child for them, less and less
-- often when it gets none; and, flat, the workers of which something is asked, and what.
local asked = {}
for i = 2, #ARGV, 2 do
  local wkey = R .. ':w:' .. ARGV[i]
  call('ZADD', R .. ':workers', NOW + tonumber(ARGV[1]), ARGV[i])
  -- One that was released has no hash any more, and gets none.
  if ARGV[i + 1] ~= '' and call('HEXISTS', wkey, 'info') == 1 then
    call('HSET', wkey, 'vit', ARGV[i + 1], 'vat', NOW)
  end
  local ask = call('HGET', wkey, 'ask')
  if ask then
    asked[#asked + 1] = ARGV[i]
    asked[#asked + 1] = ask
  end
end
local waiting = 0
for _, name in ipairs(call('SMEMBERS', R .. ':shelves')) do
  if string.sub(name, 1, 2) == 'i:' then
    waiting = waiting + call('ZCARD', R .. ':s:' .. name)
  end
end
return { waiting, asked }
