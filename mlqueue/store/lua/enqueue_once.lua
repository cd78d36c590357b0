#!lua
-- parts: events counts queue limits moves look create hooks ends cancel unique
-- Creates jobs for somebody who asks over HTTP, unless an idempotency key says that they have been. ARGV: that key (empty:
-- none), fingerprint of the request, for how long the key is kept (ms), id of the API key with which it comes (empty:
-- none), what was known of that, what is wanted of the first job's record (see part_look.lua; empty: nothing), packed jobs
-- as enqueue.lua takes them. Returns the ids of the jobs, these, those of the first time, or those that stay the only ones
-- of their unique keys; the first one's record; 1 when it was this call that submitted them, else 0. Or 0 when the
-- idempotency key came with another fingerprint, 1 when the API key is another one by now, "!" and an id when nothing was
-- created because a job is to be rejected where that one is.
if ARGV[4] ~= '' and call('HGET', R .. ':keys', ARGV[4]) ~= ARGV[5] then
  return 1
end
local function answer(ids, new)
  return { ids, ARGV[6] ~= '' and look(ids[1], ARGV[6]), new }
end
local key = ARGV[1] ~= '' and R .. ':once:' .. ARGV[1]
local known = key and call('GET', key)
if known then
  local first = cmsgpack.unpack(known)
  -- Made again because its answer was lost, it is the first time still.
  return first[1] == ARGV[2] and answer(first[2], first[3] == cmsgpack.unpack(ARGV[7])[1] and 1 or 0) or 0
end
local items, ids = {}, {}
for i = 7, #ARGV do
  local last = items[#items]
  if last and last[8] == false then
    last[8] = ARGV[i]
  else
    items[#items + 1] = cmsgpack.unpack(ARGV[i])
    ids[#ids + 1] = items[#items][1]
  end
end
local refused = rejected(items)
if refused then
  return refused
end
if key then
  call('SET', key, cmsgpack.pack({ ARGV[2], ids, ids[1] }), 'PX', ARGV[3])
end
local own, others = ids[1], false
for i, item in ipairs(items) do
  local well, failure = pcall(create, item)
  if not well then
    -- Else whoever tries again would be told of jobs that are not there.
    if key then
      call('UNLINK', key)
    end
    return redis.error_reply('ERR ' .. tostring(type(failure) == 'table' and failure.err or failure))
  end
  if type(failure) == 'string' then
    ids[i], others = string.sub(failure, 2), true -- that job is the only one of its key
  end
end
if key and others then
  call('SET', key, cmsgpack.pack({ ARGV[2], ids, own }), 'PX', ARGV[3])
end
write_ends()
write_counts()
return answer(ids, 1)
