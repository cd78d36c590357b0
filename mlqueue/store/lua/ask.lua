#!lua flags=allow-oom
-- Asks something of a worker; the one who beats for it hears of that with its next beat. ARGV: worker, what (drain, stop).
-- Returns 1, or 0 when there is no such worker.
local wkey = R .. ':w:' .. ARGV[1]
if call('HEXISTS', wkey, 'info') == 0 then
  return 0
end
call('HSET', wkey, 'ask', ARGV[2])
return 1
