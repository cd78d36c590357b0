#!lua flags=allow-oom
-- parts: events counts queue limits moves create ends history release
-- ARGV: worker, reason (crash, stall, drain), error, most crashes, most stalls. Returns ids and outcomes, flat.
return release_worker(ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5]))
