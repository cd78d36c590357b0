#!lua flags=allow-oom
-- parts: events queue moves
-- Gives a running job more time. ARGV: id, attempt (-1: the one that runs), ms, nonce, 1 when its worker is to be told.
-- Returns the state it is in and by how many ms its attempt has been prolonged (-1: it is not that one that runs), or
-- false when there is no such job.
local id = ARGV[1]
local rec = load(id)
if not rec then
  return false
end
if rec.state ~= 'r' or ARGV[2] ~= '-1' and rec.attempt ~= tonumber(ARGV[2]) then
  return { rec.state, -1 }
end
local total, last = string.match(call('HGET', jkey(id), 'j') or '0 -', '^(%d+) (.*)$')
total = tonumber(total)
if last ~= ARGV[4] then -- else it has been done; only the answer was lost
  total = total + tonumber(ARGV[3])
  call('HSET', jkey(id), 'j', string.format('%.0f', total) .. ' ' .. ARGV[4])
  if call('ZSCORE', R .. ':late', id) then
    call('ZINCRBY', R .. ':late', ARGV[3], id)
  end
  if ARGV[5] == '1' then
    ring_own(rec.worker, 'x' .. rec.attempt .. ' ' .. string.format('%.0f', total) .. ' ' .. id)
  end
end
return { rec.state, total }
