#!lua flags=no-writes
-- parts: events queue moves
-- Which jobs stand where nobody would find them. ARGV: ids. Returns, flat, id and what is wrong of each: 'shelf' (it is on
-- none of its state), 'worker' (it runs nowhere).
local answer = {}
for _, id in ipairs(ARGV) do
  local well, rec = pcall(load, id)
  if well and rec then
    local wrong
    if rec.state == 'r' then
      local known = rec.worker and call('ZSCORE', R .. ':workers', rec.worker)
      wrong = not (known and call('SISMEMBER', R .. ':h:' .. rec.worker, id) == 1) and 'worker'
    else
      local there = call('ZSCORE', R .. ':s:' .. rec.state .. ':' .. rec.queue .. ':' .. rec.lane, id)
        or rec.state == 'q' and call('ZSCORE', R .. ':s:i:' .. rec.queue .. ':' .. rec.lane, id)
      if rec.state == 'w' then
        there = there and call('ZSCORE', R .. ':sched', id)
      end
      wrong = not there and 'shelf'
    end
    if wrong then
      answer[#answer + 1], answer[#answer + 2] = id, wrong
    end
  end
end
return answer
