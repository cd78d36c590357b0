#!lua flags=allow-oom
-- parts: events queue
-- Pauses a queue: no job of it is started until it is resumed. ARGV: queue, 1 to pause it and 0 to resume it, who says so.
-- Workers are told in their own hash, which their turns read anyway: where nothing is paused a turn costs nothing more.
local queue, key = ARGV[1], R .. ':paused'
if ARGV[2] == '1' then
  if call('HEXISTS', key, queue) == 0 then
    call('HSET', key, queue, cmsgpack.pack({ NOW, ARGV[3] }))
  end
else
  call('HDEL', key, queue)
end
local names, packed = {}, nil
for _, name in ipairs(call('HKEYS', key)) do
  names[name] = 1
  packed = true
end
packed = packed and cmsgpack.pack(names)
for _, worker in ipairs(call('ZRANGE', R .. ':workers', 0, -1)) do
  local wkey = R .. ':w:' .. worker
  if not packed then
    call('HDEL', wkey, 'pz')
  elseif call('HEXISTS', wkey, 'info') == 1 then
    call('HSET', wkey, 'pz', packed)
  end
end
if ARGV[2] ~= '1' then
  -- Idle workers sleep until somebody rings.
  for _, name in ipairs(call('SMEMBERS', R .. ':shelves')) do
    local state, of, lane = string.match(name, '^(.):([^:]*):(.*)$')
    if of == queue and (state == 'q' or state == 'i') and call('EXISTS', R .. ':s:' .. name) == 1 then
      ring(queue, lane)
    end
  end
end
return NOW
