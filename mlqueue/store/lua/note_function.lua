#!lua flags=allow-oom
-- Why a worker could not load a posted function. ARGV: name, serial, text, worker. Of one that has been replaced or removed
-- nothing is noted.
if call('HEXISTS', R .. ':pf', ARGV[1]) == 1 then
  call('HSET', R .. ':pfe', ARGV[1], cmsgpack.pack({ ARGV[2], ARGV[3], ARGV[4], NOW }))
end
return 1
