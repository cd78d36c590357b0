#!lua flags=no-writes
-- What a job has shown of itself. ARGV: id, "l" (lines of its log) or "m" (metrics), of lines the number of the first
-- (below 0: so many from the end), how many at most; of metrics the time behind which points are wanted.
-- Returns false when there is no such job, else its state, then for lines the number of the first one and the lines, and
-- for metrics the attempt that logged some last and, flat, names and what is kept of each.
local f = call('HMGET', jkey(ARGV[1]), 's', 'm', 'o')
if not f[1] then
  return false
end
if ARGV[2] == 'm' then
  local found, after = call('HGETALL', R .. ':me:' .. ARGV[1]), tonumber(ARGV[3])
  for i = 2, after > 0 and #found or 0, 2 do
    -- From the end: a point has 24 bytes, the last 8 of which are its time, behind a head of 12.
    local value, stop = found[i], #found[i]
    while stop > 12 and struct.unpack('<d', value, stop - 7) > after do
      stop = stop - 24
    end
    found[i] = string.sub(value, 1, 12) .. string.sub(value, stop + 1)
  end
  return { f[1], tonumber(f[2] or 0), found }
end
local key, first = R .. ':lg:' .. ARGV[1], tonumber(ARGV[3])
local dropped, n = f[3] and cmsgpack.unpack(f[3])[1] or 0, call('LLEN', key)
local at = math.max(0, first < 0 and n + first or first - dropped)
if at >= n then
  return { f[1], dropped + n, {} }
end
return { f[1], dropped + at, call('LRANGE', key, at, at + tonumber(ARGV[4]) - 1) }
