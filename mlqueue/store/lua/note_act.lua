#!lua flags=allow-oom
-- Notes what somebody does. ARGV: who, act, what it is done to, how many such notes are kept.
call('LPUSH', R .. ':acts', cmsgpack.pack({ NOW, ARGV[1], ARGV[2], ARGV[3] }))
call('LTRIM', R .. ':acts', 0, tonumber(ARGV[4]) - 1)
return NOW
