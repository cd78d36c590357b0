#!lua flags=allow-oom
-- parts: events queue limits moves
-- Puts jobs where they belong: those that run nowhere into their queues, others onto the shelf of their state. ARGV: id and
-- what is wrong (astray.lua) of each. Looks again before it acts. Returns how many it has put back.
local put = 0
for i = 1, #ARGV, 2 do
  local id, wrong = ARGV[i], ARGV[i + 1]
  local rec = load(id)
  local was = rec and rec.state
  if was == 'r' and wrong == 'worker' and not (rec.worker and call('ZSCORE', R .. ':workers', rec.worker)
    and call('SISMEMBER', R .. ':h:' .. rec.worker, id) == 1) then
    rec.worker = rec.worker or ''
    requeue(id, rec, {})
    put = put + 1
  elseif was and was ~= 'r' and wrong == 'shelf' then
    if was == 'w' then
      schedule(id, rec, tonumber(call('HGET', jkey(id), 'd') or NOW), {})
    elseif was == 'q' then
      requeue(id, rec, {})
    else
      shelve(was, rec, id)
      if was == 'd' then call('ZADD', R .. ':dead', 'NX', call('HGET', jkey(id), 'f') or NOW, id) end
    end
    put = put + 1
  end
end
return put
