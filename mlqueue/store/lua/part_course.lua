-- How the namespace fares over time, for charts: an entry for each stretch of time, of a bounded number of them. What the
-- counters (R:m) say is kept as it stands; the difference of two entries is what happened between.

-- How long a stretch is in ms, and how many are kept: some more than an hour.
local STRETCH, KEPT = 15000, 250

local function note_course()
  local size = { q = 0, i = 0, w = 0 }
  for _, name in ipairs(call('SMEMBERS', R .. ':shelves')) do
    local state, queue = string.match(name, '^(.):([^:]*):')
    if size[state] and queue ~= 'mlqueue.callbacks' then
      size[state] = size[state] + call('ZCARD', R .. ':s:' .. name)
    end
  end
  local running = 0
  for _, worker in ipairs(call('ZRANGE', R .. ':workers', 0, -1)) do
    running = running + call('SCARD', R .. ':h:' .. worker)
  end
  -- Ends by state, retries, crashes, stalls, callbacks given up; how long jobs waited and ran, in ms, and how many did.
  local sums = { s = 0, d = 0, c = 0, y = 0, x = 0, z = 0, f = 0, ws = 0, wn = 0, rs = 0, rn = 0 }
  local all = call('HGETALL', R .. ':m')
  for at = 1, #all, 2 do
    local what, rest = string.match(all[at], '^(.):(.*)$')
    local number = tonumber(all[at + 1]) or 0
    local key = what
    if what == 'e' then
      key = string.match(rest, '^[^:]*:(.)')
    elseif what == 'c' then
      key = rest == 'f' and 'f' or nil
    elseif what == 'w' or what == 'r' then
      key = what .. (string.match(rest, ':sum$') and 's' or 'n')
    end
    if key and sums[key] then
      sums[key] = sums[key] + number
    end
  end
  call('LPUSH', R .. ':course', cmsgpack.pack({ NOW, size.q + size.i, size.w, running, sums.s, sums.d, sums.c, sums.y,
    sums.x + sums.z, sums.f, sums.ws, sums.wn, sums.rs, sums.rn }))
  call('LTRIM', R .. ':course', 0, KEPT - 1)
end
