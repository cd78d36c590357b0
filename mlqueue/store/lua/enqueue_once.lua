#!lua
-- parts: events counts queue limits moves create ends unique
-- Creates jobs unless an idempotency key says that they have been. ARGV: key, fingerprint of the request, for how long the
-- key is kept (ms), packed jobs. Returns the ids of the jobs, these or those of the first time, and 1 when they are these;
-- false when the key came with another fingerprint; "!" and an id when nothing was created because a job is to be rejected
-- where that one is.
local key = R .. ':once:' .. ARGV[1]
local known = call('GET', key)
if known then
  local first = cmsgpack.unpack(known)
  return first[1] == ARGV[2] and { first[2], 0 }
end
local items, ids = {}, {}
for i = 4, #ARGV do
  items[#items + 1] = cmsgpack.unpack(ARGV[i])
  ids[#ids + 1] = items[#items][1]
end
local refused = rejected(items)
if refused then
  return refused
end
call('SET', key, cmsgpack.pack({ ARGV[2], ids }), 'PX', ARGV[3])
local others = false
for i, item in ipairs(items) do
  local well, failure = pcall(create, item)
  if not well then
    -- Else whoever tries again would be told of jobs that are not there.
    call('UNLINK', key)
    return redis.error_reply('ERR ' .. tostring(type(failure) == 'table' and failure.err or failure))
  end
  if type(failure) == 'string' then
    ids[i], others = string.sub(failure, 2), true -- that job is the only one of its key
  end
end
if others then
  call('SET', key, cmsgpack.pack({ ARGV[2], ids }), 'PX', ARGV[3])
end
write_ends()
write_counts()
return { ids, 1 }
