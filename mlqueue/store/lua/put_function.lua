#!lua
-- parts: events queue
-- Keeps a posted function, and tells all workers. ARGV: name, serial, when it was signed, code, signature, nonce, how many
-- functions there may be.
-- Returns 0, the newest serial of the name when that is not below, or 'full'.
local name, serial, most = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[7])
assert(serial and tonumber(ARGV[3]) and most, 'malformed function')
local newest = tonumber(call('HGET', R .. ':pfs', name) or 0)
local known = call('HGET', R .. ':pf', name)
known = known and cmsgpack.unpack(known)
if serial <= newest then
  -- Sent again because the answer was lost, or by somebody else.
  return known and known[7] == ARGV[6] and 0 or string.format('%.0f', newest)
end
if not known and (call('HLEN', R .. ':pf') >= most or newest == 0 and call('HLEN', R .. ':pfs') >= 10 * most) then
  return 'full'
end
local version = call('INCR', R .. ':pfv')
-- One that replaces another keeps its place.
call('HSET', R .. ':pf', name, cmsgpack.pack({ known and known[1] or version, serial, tonumber(ARGV[3]), NOW, ARGV[4],
  ARGV[5], ARGV[6] }))
call('HSET', R .. ':pfs', name, string.format('%.0f', serial))
call('HDEL', R .. ':pfe', name)
for _, worker in ipairs(call('ZRANGE', R .. ':workers', 0, -1)) do
  ring_own(worker, 'f')
end
return 0
