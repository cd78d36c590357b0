#!lua flags=allow-oom
-- parts: events counts queue limits moves create hooks ends cancel
-- ARGV: id. A waiting job ends cancelled; a running one gets the flag and its worker is told. Returns the state that
-- the job was in, or false.
local id = ARGV[1]
local rec = load(id)
if not rec then
  return false
end
cancel(id, rec)
write_ends()
write_counts()
return rec.state
