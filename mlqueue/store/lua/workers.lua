#!lua flags=no-writes
-- Returns for each worker: name, ms left of its lease, info, the jobs it holds.
local answer = {}
local all = call('ZRANGE', R .. ':workers', 0, -1, 'WITHSCORES')
for i = 1, #all, 2 do
  answer[#answer + 1] = { all[i], tonumber(all[i + 1]) - NOW, call('HGET', R .. ':w:' .. all[i], 'info') or '',
    call('SMEMBERS', R .. ':h:' .. all[i]) }
end
return answer
