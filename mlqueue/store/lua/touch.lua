#!lua
-- parts: events queue moves create hooks progress
-- Progress of running jobs. ARGV: id, attempt, value, note of each.
-- Returns for each 1 (written), 0 (stale) or 2 (written, and cancelling has been asked for).
local answer = {}
for i = 1, #ARGV, 4 do
  local rec = load(ARGV[i])
  if not rec or rec.state ~= 'r' or rec.attempt ~= tonumber(ARGV[i + 1]) then
    answer[#answer + 1] = 0
  else
    write_progress(ARGV[i], rec, ARGV[i + 2], ARGV[i + 3])
    answer[#answer + 1] = rec.cancel and 2 or 1
  end
end
return answer
