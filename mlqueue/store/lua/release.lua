#!lua flags=allow-oom
-- parts: events counts queue limits moves create hooks ends history late release
-- ARGV: worker, reason (crash, stall, drain), error, most crashes, most stalls, what is known of its jobs (packed):
-- attempts that had begun by job (false: not known, so all), and by job the attempt for which its process was killed and
-- why. Returns ids and outcomes, flat.
local known = cmsgpack.unpack(ARGV[6])
return release_worker(ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5]), known[1] or nil, known[2] or nil)
