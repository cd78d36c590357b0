#!lua
-- parts: events queue moves look create
-- Creates jobs for somebody who asks over HTTP, unless an idempotency key says that they have been. ARGV: that key (empty:
-- none), fingerprint of the request, for how long the key is kept (ms), id of the API key with which it comes (empty:
-- none), what was known of that, what is wanted of the first job's record (see part_look.lua; empty: nothing), packed jobs
-- as enqueue.lua takes them. Returns the ids of the jobs, these or those of the first time, and the first one's record; 0 when the idempotency key
-- came with another fingerprint, 1 when the API key is another one by now.
if ARGV[4] ~= '' and call('HGET', R .. ':keys', ARGV[4]) ~= ARGV[5] then
  return 1
end
local function answer(ids)
  return { ids, ARGV[6] ~= '' and look(ids[1], ARGV[6]) }
end
local key = ARGV[1] ~= '' and R .. ':once:' .. ARGV[1]
local known = key and call('GET', key)
if known then
  local first = cmsgpack.unpack(known)
  return first[1] == ARGV[2] and answer(first[2]) or 0
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
if key then
  call('SET', key, cmsgpack.pack({ ARGV[2], ids }), 'PX', ARGV[3])
end
for _, item in ipairs(items) do
  local well, failure = pcall(create, item)
  if not well then
    -- Else whoever tries again would be told of jobs that are not there.
    if key then
      call('UNLINK', key)
    end
    return redis.error_reply('ERR ' .. tostring(type(failure) == 'table' and failure.err or failure))
  end
end
return answer(ids)
