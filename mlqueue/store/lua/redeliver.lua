#!lua
-- parts: events counts queue moves create hooks ends
-- Has the callback of an ended job delivered again, or its webhook told of its end. ARGV: id, URL of the callback ('' as it
-- is), nonce, URL of the webhook ('' as it is); with neither URL both, as far as there are any. Returns the job's state,
-- '-' when it has neither, false when there is no such job.
local id, url, nonce, hook = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local key = R .. ':cb:' .. id
local rec = load(id)
if not rec then
  return false
end
if not ENDED[rec.state] then
  return rec.state
end
local known = call('HMGET', key, 'u', 'w')
local again = url == '' and hook == ''
if again and not known[1] and not known[2] then
  return '-'
end
if url ~= '' then
  call('HSET', key, 'u', url)
  if not string.find(rec.callback or '', '1', 1, true) then
    call('HSET', jkey(id), 'C', '1' .. (rec.callback or ''))
  end
end
if hook ~= '' then
  call('HSET', key, 'w', hook)
  if not known[2] then
    call('HSET', key, 'e', 'sdc', 'm', 5000)
    call('HSET', jkey(id), 'C', (call('HGET', jkey(id), 'C') or '') .. 'sdc')
  end
end
if url ~= '' or again and known[1] then
  call('HSET', key, 's', 'p')
  create({ id .. '.cb' .. rec.number .. '.' .. nonce, CALLBACKS, CALLBACK, CALLBACK, 0, -1, -1, NO_ARGUMENTS, 0, id })
end
if hook ~= '' or again and known[2] then
  local delivery = id .. '.wh' .. rec.number .. '.' .. nonce
  local arguments = cmsgpack.pack({ rec.state, tonumber(call('HGET', jkey(id), 'f')), rec.attempt, 1 })
  call('HSET', key, 'h', 'p', 'i', delivery)
  create({ delivery, CALLBACKS, CALLBACK, CALLBACK, 0, -1, -1, string.char(0x92) .. arguments .. string.char(0x80), 0, id })
end
emit('callback', id)
return rec.state
