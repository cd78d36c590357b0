#!lua flags=allow-oom
-- parts: events counts queue limits moves ends remove
-- Forgets jobs. ARGV: states that they may be in (letters; of one that runs nothing is forgotten), time in ms at which
-- they must have ended, or if they have not, been created, at the latest (-1 any), then ids.
-- Returns for each 1 (forgotten) or 0 (it is as it was, or unknown).
local states, latest = ARGV[1], tonumber(ARGV[2])

local function meant(id)
  local f = call('HMGET', jkey(id), 's', 'f', 'N', 't')
  return f[1] and string.find(states, f[1], 1, true)
    and (latest < 0 or tonumber(ENDED[f[1]] and f[2] or f[3] or f[4] or 0) <= latest)
end

local answer = {}
for i = 3, #ARGV do
  answer[i - 2] = meant(ARGV[i]) and remove(ARGV[i]) or 0
end
return answer
