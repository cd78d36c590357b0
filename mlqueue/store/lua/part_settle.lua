-- Ends of attempts, as workers report them.

-- A group's child has ended well: when it was the last one, the group's callbacks are created.
local function complete_child(id, group)
  local key = R .. ':g:' .. group[1]
  local parties = tonumber(call('GET', key .. ':n') or -1)
  if parties < 0 then
    if parties == -2 then
      call('RPUSH', R .. ':mig:gl', cmsgpack.pack({ id, group })) -- counted where the group has moved to
    end
    return
  end
  call('SADD', key, id)
  call('PEXPIRE', key, math.max(1, call('PTTL', key .. ':n')))
  if call('SCARD', key) >= parties then
    for _, item in ipairs(group[2]) do
      create(item)
    end
    call('UNLINK', key, key .. ':n')
  end
end

local settle_verbs = {}

-- s: id, attempt, 'f', progress, note, spawned, group, inline result, short, content type, full, chunks, size
function settle_verbs.f(id, rec, s)
  local fields = {}
  if rec.cancel then
    drop_result(id)
    return cancelled(id, rec, 'ended')
  end
  if s[8] then
    fields = { 'r', s[8] }
  else
    local key = R .. ':r:' .. id
    local result = { 's', s[9], 'c', s[10], 'z', s[13] }
    if s[12] > 0 then
      for i = 0, s[12] - 1 do
        if call('EXISTS', R .. ':x:' .. id .. ':r' .. rec.attempt .. ':' .. i) == 0 then
          error('chunk ' .. i .. ' of the result is gone')
        end
      end
      for i = 0, s[12] - 1 do
        call('PERSIST', R .. ':x:' .. id .. ':r' .. rec.attempt .. ':' .. i)
      end
      result[#result + 1] = 'n'
      result[#result + 1] = s[12]
      result[#result + 1] = 'k'
      result[#result + 1] = rec.attempt
    else
      result[#result + 1] = 'f'
      result[#result + 1] = s[11]
    end
    call('HSET', key, unpack(result))
  end
  finish(id, rec, 's', fields, rec.ttl)
end

-- s: ..., delay in ms, error, 1 when it counts as a retry, how a limit ended it
function settle_verbs.r(id, rec, s)
  if rec.cancel then
    return cancelled(id, rec, 'ended')
  end
  assert(type(s[8]) == 'number', 'malformed delay')
  call('SET', R .. ':e:' .. id, s[9])
  note_attempt(id, rec, 'failed', s[9], s[11])
  local fields = { 'y', tonumber(call('HGET', jkey(id), 'y') or 0) + s[10] }
  if s[10] == 1 then
    count('y:' .. rec.actor)
  end
  if s[8] > 0 then
    schedule(id, rec, NOW + s[8], fields)
  else
    requeue(id, rec, fields)
  end
end

-- s: ..., reason, error, how a limit ended it
function settle_verbs.b(id, rec, s)
  if rec.cancel then
    return cancelled(id, rec, 'ended')
  end
  assert(type(s[8]) == 'string' and type(s[9]) == 'string', 'malformed reason or error')
  drop_result(id)
  call('SET', R .. ':e:' .. id, s[9])
  note_attempt(id, rec, s[8], s[9], s[10])
  finish(id, rec, 'd', { 'g', s[8] }, -1)
end

-- Given back unharmed: the worker is being drained, or it had not begun, or it is not its time. s: ..., 1 when it had not
-- begun, delay (ms)
function settle_verbs.l(id, rec, s)
  if rec.cancel then
    return cancelled(id, rec, 'lost')
  end
  if s[9] > 0 then
    return schedule(id, rec, NOW + s[9], {})
  end
  requeue(id, rec, {}, s[8] == 1)
end

-- The job took note of its cancelling and ended.
function settle_verbs.c(id, rec)
  cancelled(id, rec, 'raised')
end

local function settle_one(s)
  local id, attempt, verb = s[1], s[2], s[3]
  if type(id) ~= 'string' or type(attempt) ~= 'number' or not settle_verbs[verb] then
    error('malformed settle')
  end
  local rec, started = load(id)
  if not rec or rec.state ~= 'r' or rec.attempt ~= attempt then
    return 'stale'
  end
  write_progress(id, rec, s[4], s[5])
  -- Children before the parent's end: made again, they exist already and nothing happens.
  if s[6] and not rec.cancel then
    for _, item in ipairs(s[6]) do
      create(item)
    end
  end
  if s[7] and not rec.cancel then
    complete_child(id, s[7])
  end
  settle_verbs[verb](id, rec, s)
  if verb ~= 'l' and rec.queue ~= CALLBACKS then
    runs = observe(runs, rec.actor, NOW - (started or NOW))
  end
  return 'ok'
end

-- Settles each job on its own; answers, flat, position and text of those that did not go well.
local function settle(first, last)
  local refused = {}
  -- Where limits come into use meanwhile, by a job that one of these has spawned, slots are freed one by one.
  local gathers = limits()
  if gathers then
    gathers.gather_freed()
  end
  for i = first, last do
    local well, answer = pcall(function() return settle_one(cmsgpack.unpack(ARGV[i])) end)
    if not well or answer ~= 'ok' then
      if type(answer) == 'table' then
        answer = answer.err or 'unknown error'
      end
      refused[#refused + 1] = i - first
      refused[#refused + 1] = well and 'stale' or 'error ' .. tostring(answer)
    end
  end
  if gathers then
    gathers.write_freed()
  end
  write_ends()
  return refused
end
