#!lua
-- parts: events queue moves
-- Registers a bell with a job that has not ended. ARGV: id, "e" or "a", bell.
-- Returns the state, or false when there is no such job.
local rec = load(ARGV[1])
if not rec then
  return false
end
if rec.state == 'q' or rec.state == 'w' or rec.state == 'r' then
  local key = R .. ':wt:' .. ARGV[1]
  call('SADD', key, ARGV[2] .. ARGV[3])
  call('PEXPIRE', key, 86400000)
  if not rec.watched then
    call('HSET', jkey(ARGV[1]), 'W', 1)
  end
end
return rec.state
