-- Moves jobs that are due from the schedule into their lanes; at most `limit` a call. Returns ms until the next, or -1.
local function promote(limit)
  local first = call('ZRANGE', R .. ':sched', 0, 0, 'WITHSCORES')
  if first[2] and tonumber(first[2]) <= NOW then
    for _, id in ipairs(call('ZRANGEBYSCORE', R .. ':sched', '-inf', NOW, 'LIMIT', 0, limit)) do
      -- One broken record must not hold up the others.
      pcall(function()
        local rec = load(id)
        if rec and rec.state == 'w' then
          unshelve('w', rec, id)
          requeue(id, rec, {})
        end
      end)
      call('ZREM', R .. ':sched', id)
    end
    first = call('ZRANGE', R .. ':sched', 0, 0, 'WITHSCORES')
  end
  return first[2] and math.max(0, tonumber(first[2]) - NOW) or -1
end
