#!lua flags=allow-oom
-- parts: events queue limits
-- Sets how many slots a limit has. ARGV: name, capacity (-1: no longer set by hand; what settings or actors say counts).
-- Returns what it has now. Jobs that wait for it look again.
local name, capacity = ARGV[1], tonumber(ARGV[2])
local key = R .. ':lim'
if capacity >= 0 then
  call('HSET', key, name, capacity)
else
  call('HDEL', key, name)
end
limits(true).open(name)
-- Those of its keys too, also where none of their jobs holds a slot.
for _, one in ipairs(call('SMEMBERS', R .. ':park')) do
  if string.sub(one, 1, #name + 1) == name .. '/' then
    limited.open(one)
  end
end
return limited.capacity(name)
