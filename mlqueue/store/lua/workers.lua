#!lua flags=no-writes
-- Returns for each worker: name, ms left of its lease, info, the jobs it holds, its vitals, ms since these were told (-1:
-- never), what is asked of it.
local answer = {}
local all = call('ZRANGE', R .. ':workers', 0, -1, 'WITHSCORES')
for i = 1, #all, 2 do
  local f = call('HMGET', R .. ':w:' .. all[i], 'info', 'vit', 'vat', 'ask')
  answer[#answer + 1] = { all[i], tonumber(all[i + 1]) - NOW, f[1] or '', call('SMEMBERS', R .. ':h:' .. all[i]),
    f[2] or '', f[3] and NOW - f[3] or -1, f[4] or '' }
end
return answer
