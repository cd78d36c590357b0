#!lua
-- parts: events counts queue moves create ends
-- Has the callback of an ended job delivered again. ARGV: id, URL ('' as it is), nonce. Returns the job's state, '-' when
-- it has no callback, false when there is no such job.
local id = ARGV[1]
local rec = load(id)
if not rec then
  return false
end
if not ENDED[rec.state] then
  return rec.state
end
if not rec.callback and ARGV[2] == '' then
  return '-'
end
if ARGV[2] ~= '' then
  call('HSET', R .. ':cb:' .. id, 'u', ARGV[2])
  call('HSET', jkey(id), 'C', 1)
end
call('HSET', R .. ':cb:' .. id, 's', 'p')
create({ id .. '.cb' .. rec.number .. '.' .. ARGV[3], CALLBACKS, CALLBACK, CALLBACK, 0, -1, -1, NO_ARGUMENTS, 0, id })
emit('callback', id)
return rec.state
