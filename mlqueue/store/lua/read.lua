#!lua flags=no-writes
-- parts: events queue moves look
-- Reads records. ARGV: what (see part_look.lua; also n newest event, k what an API key is), then ids; with k the key's id
-- behind them.
-- Returns for each what `look` does; then with n the id of the newest event behind them (the record is as it left it), and
-- with k what is known of the key.
local what = ARGV[1]
local last, key = #ARGV, nil
if string.find(what, 'k', 1, true) then
  last, key = last - 1, ARGV[last]
end
local answer = {}
for i = 2, last do
  answer[#answer + 1] = look(ARGV[i], what)
end
if string.find(what, 'n', 1, true) then
  local newest = redis.pcall('XREVRANGE', R .. ':ev', '+', '-', 'COUNT', 1)[1]
  answer[#answer + 1] = newest and newest[1] or '0-0'
end
if key then
  answer[#answer + 1] = call('HGET', R .. ':keys', key)
end
return answer
