#!lua flags=allow-oom
-- parts: events counts queue limits moves ends remove
-- Forgets waiting jobs. ARGV: queue ('' all but callbacks to be delivered), how many at most. Returns how many it forgot.
local gone, limit = 0, tonumber(ARGV[2])
for _, name in ipairs(call('SMEMBERS', R .. ':shelves')) do
  local state, queue = string.match(name, '^(.):([^:]*):')
  if (state == 'q' or state == 'i' or state == 'w') and (ARGV[1] == '' and queue ~= CALLBACKS or queue == ARGV[1]) and gone < limit then
    for _, id in ipairs(call('ZRANGE', R .. ':s:' .. name, 0, limit - gone - 1)) do
      remove(id)
      gone = gone + 1
    end
  end
end
return gone
