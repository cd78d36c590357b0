#!lua flags=no-writes
-- How attempts stand that a worker runs. ARGV: worker, id and attempt of each.
-- Returns for each: 1 when the worker holds it still, for how many ms its cancelling has been asked for (-1: it has not
-- been), by how many ms it was prolonged.
local answer = {}
for i = 2, #ARGV, 2 do
  local f = call('HMGET', jkey(ARGV[i]), 's', 'w', 'k', 'c', 'j')
  local held = f[1] == 'r' and f[2] == ARGV[1] and f[3] == ARGV[i + 1]
  answer[#answer + 1] = { held and 1 or 0, f[4] and NOW - tonumber(f[4]) or -1,
    held and tonumber(string.match(f[5] or '', '^%d+') or 0) or 0 }
end
return answer
