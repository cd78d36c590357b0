-- What moves of existing jobs need.

local function unshelve(state, rec, id)
  call('ZREM', R .. ':s:' .. state .. ':' .. rec.queue .. ':' .. rec.lane, id)
  if state == 'q' and limits() then
    limited.left(id, rec)
  end
end

-- The record's fields that moves need, or nil when there is none; and when it was started. That is not one of them because
-- a table of more than sixteen costs twice as much.
local function load(id)
  local f = call('HMGET', jkey(id), 's', 'k', 'w', 'q', 'a', 'n', 'T', 'l', 'p', 'c', 'W', 'K', 'x', 'i', 'C', 'A',
    'u', 'H')
  if not f[1] then
    return nil
  end
  local rec = {
    state = f[1], attempt = tonumber(f[2] or 0), worker = f[3], queue = f[4], actor = f[5], number = tonumber(f[6]),
    ttl = tonumber(f[7] or -1), lane = f[8] or f[5], priority = tonumber(f[9] or 0), cancel = f[10], watched = f[11],
    checkpoint = f[12], crashes = tonumber(f[13] or 0), alone = f[14], callback = f[15], awaits = f[16],
  }
  if f[18] then
    rec.slots = f[18]
  end
  return rec, f[17]
end
