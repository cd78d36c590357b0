#!lua flags=no-writes
-- Events behind one. ARGV: its id, how many at most. Returns them, and the ids of the oldest and newest that there are
-- (false when there is none).
local key = R .. ':ev'
local oldest = call('XRANGE', key, '-', '+', 'COUNT', 1)[1]
local newest = call('XREVRANGE', key, '+', '-', 'COUNT', 1)[1]
return { call('XRANGE', key, '(' .. ARGV[1], '+', 'COUNT', ARGV[2]), oldest and oldest[1] or false,
  newest and newest[1] or false }
