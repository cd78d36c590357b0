#!lua flags=allow-oom
-- parts: queue moves ends remove
-- ARGV: ids. Forgets jobs that do not run. Returns for each 1 (forgotten) or 0 (running, or unknown).
local answer = {}
for i = 1, #ARGV do
  answer[i] = remove(ARGV[i])
end
return answer
