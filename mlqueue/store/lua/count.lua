#!lua flags=no-writes
-- Returns, flat, "S:QUEUE:LANE" of every shelf and its size; running jobs count as state r. Also the running ones that
-- every worker holds, so the cost grows with lanes and running jobs, not with waiting or ended ones.
local answer, running = {}, {}
for _, name in ipairs(call('SMEMBERS', R .. ':shelves')) do
  answer[#answer + 1] = name
  answer[#answer + 1] = call('ZCARD', R .. ':s:' .. name)
end
for _, worker in ipairs(call('ZRANGE', R .. ':workers', 0, -1)) do
  for _, id in ipairs(call('SMEMBERS', R .. ':h:' .. worker)) do
    local f = call('HMGET', jkey(id), 'q', 'a', 'l')
    if f[1] then
      local name = 'r:' .. f[1] .. ':' .. (f[3] or f[2])
      running[name] = (running[name] or 0) + 1
    end
  end
end
for name, n in pairs(running) do
  answer[#answer + 1] = name
  answer[#answer + 1] = n
end
return answer
