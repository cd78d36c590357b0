#!lua flags=allow-oom
-- parts: events queue limits
-- What a worker knows of limits. ARGV: number of capacities that its settings have, name and capacity of each, then of
-- each actor that it knows the name, its resources (a packed list of name and number), how many of its jobs may run at a
-- time (-1: as many as like).
-- Returns 1.
local key, actors = R .. ':lim', R .. ':lim:a'
local n = tonumber(ARGV[1])
for i = 2, 2 * n, 2 do
  call('HSET', key, '~' .. ARGV[i], ARGV[i + 1])
end
local changed = {}
for i = 2 + 2 * n, #ARGV, 3 do
  local actor, resources, most = ARGV[i], cmsgpack.unpack(ARGV[i + 1]), tonumber(ARGV[i + 2])
  if #resources == 0 and most < 0 then
    if call('HDEL', actors, actor) == 1 then changed[actor] = true end
  else
    local spec = cmsgpack.pack({ resources, most >= 0 and 1 or 0 })
    if call('HGET', actors, actor) ~= spec then changed[actor] = true end
    call('HSET', actors, actor, spec)
  end
  if tonumber(call('HGET', key, '~@' .. actor) or -1) ~= most then
    changed[actor] = true
  end
  if most >= 0 then
    call('HSET', key, '~@' .. actor, most)
  else
    call('HDEL', key, '~@' .. actor)
  end
end
if n > 0 or next(changed) then
  -- What waits may have to wait no longer.
  for _, name in ipairs(call('SMEMBERS', R .. ':park')) do
    limits(true).open(name)
  end
end
return 1
