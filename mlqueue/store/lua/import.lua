#!lua
-- parts: queue moves create ends history
-- Creates dead jobs, as they were exported. ARGV: one packed item each: the job (as `create` takes it), its attempt,
-- retries, crashes, stalls, worker, created, started and finished in ms (0: none), reason, error, attempts (each packed).
-- Returns for each 1 (created), 0 (the id exists) or the error's text.
local answer = {}
for i = 1, #ARGV do
  local well, made = pcall(function()
    local item = cmsgpack.unpack(ARGV[i])
    local id = item[1][1]
    if create(item[1]) == 0 then
      return 0
    end
    local rec = load(id)
    unshelve(rec.state, rec, id)
    call('ZREM', R .. ':sched', id)
    rec.callback = nil -- it was called when the job died
    rec.worker = item[6]
    local fields = { 'k', item[2], 'y', item[3], 'x', item[4], 'z', item[5], 't', item[7], 'g', item[10] }
    if item[6] ~= '' then fields[#fields + 1] = 'w' fields[#fields + 1] = item[6] end
    if item[8] > 0 then fields[#fields + 1] = 'u' fields[#fields + 1] = item[8] end
    call('SET', R .. ':e:' .. id, item[11])
    for _, attempt in ipairs(item[12]) do
      call('RPUSH', R .. ':at:' .. id, attempt)
    end
    finish(id, rec, 'd', fields, -1)
    write_ends()
    call('HSET', jkey(id), 'f', item[9])
    call('ZADD', R .. ':dead', item[9], id)
    return 1
  end)
  answer[i] = well and made or 'error ' .. tostring(type(made) == 'table' and made.err or made)
end
return answer
