-- Taking jobs from workers that are gone.

-- Takes a running job from a worker that is gone. reason: crash, stall or drain; begun: whether it had begun; doom: why
-- the process was killed for it, when it was; idle: all its jobs only waited for others; alone: it is the only one to
-- blame. Returns what became of the job.
local function release_one(id, worker, reason, begun, doom, idle, alone, err, max_crashes, max_stalls)
  local rec = load(id)
  if not rec or rec.state ~= 'r' or rec.worker ~= worker then
    call('SREM', R .. ':h:' .. worker, id)
    return 'gone'
  end
  if doom and doom[1] == rec.attempt then
    return give_up(id, rec, doom[2], tonumber(call('HGET', jkey(id), 'Z') or max_stalls), 'killed')
  end
  if rec.cancel then
    cancelled(id, rec, 'lost')
    return 'cancelled'
  end
  if not begun then
    return requeue(id, rec, {}, true) == 'i' and 'isolated' or 'queued'
  end
  if rec.queue == CALLBACKS or rec.awaits and not idle then
    -- It cannot have been the reason: another job ran, and in this one no code of the user's.
    reason = 'drain'
  end
  local fields = {}
  local dead = nil
  local own = call('HMGET', jkey(id), 'z', 'X', 'Z')
  if reason == 'crash' then
    rec.crashes = rec.crashes + 1
    fields = { 'x', rec.crashes }
    count('x:' .. rec.actor)
    -- Only a crash suffered alone proves that it was this job.
    if alone and rec.crashes >= tonumber(own[2] or max_crashes) then
      dead = 'crashed'
    end
  elseif reason == 'stall' then
    local stalls = tonumber(own[1] or 0) + 1
    fields = { 'z', stalls }
    count('z:' .. rec.actor)
    if stalls >= tonumber(own[3] or max_stalls) then
      dead = 'stalled'
    end
  end
  if reason ~= 'drain' then
    call('SET', R .. ':e:' .. id, err)
    note_attempt(id, rec, reason == 'crash' and 'crashed' or 'stalled', err)
  end
  if dead then
    fields[#fields + 1] = 'g'
    fields[#fields + 1] = dead
    finish(id, rec, 'd', fields, -1)
    return 'dead'
  end
  return requeue(id, rec, fields) == 'i' and 'isolated' or 'queued'
end

-- An attempt that was given up before its process was killed for it: says so.
local function note_killed(id, attempt)
  local key = R .. ':at:' .. id
  for i, item in ipairs(call('LRANGE', key, 0, -1)) do
    local past = cmsgpack.unpack(item)
    if past[1] == attempt then
      past[7] = 'killed'
      call('LSET', key, i - 1, cmsgpack.pack(past))
    end
  end
end

-- Takes every job from a worker incarnation and forgets it. begun: the attempts that had begun, by job; when that is not
-- known (nil) all had. dooms: by job the attempt for which the process was killed, and why.
-- Returns, flat, ids and what became of them.
local function release_worker(worker, reason, err, max_crashes, max_stalls, begun, dooms)
  local held = R .. ':h:' .. worker
  local ids = call('SMEMBERS', held)
  local answer = {}
  local active, waiting, ran
  local function look(known)
    active, waiting, ran = 0, 0, {}
    for _, id in ipairs(ids) do
      local f = call('HMGET', jkey(id), 'A', 'q', 'k')
      -- One that waits for another has begun, whatever is known.
      ran[id] = not known or f[1] or f[3] and known[id] == tonumber(f[3])
      if f[2] ~= CALLBACKS and ran[id] then
        active, waiting = active + (f[1] and 0 or 1), waiting + (f[1] and 1 or 0)
      end
    end
  end
  look(begun)
  if reason == 'crash' and active + waiting == 0 then
    look(nil) -- none had begun: it died of what it does before, such as reading the arguments of one of them
  end
  for _, id in ipairs(ids) do
    local well, outcome = pcall(release_one, id, worker, reason, ran[id], dooms and dooms[id],
      active == 0, active == 1 or active == 0 and waiting == 1, err, max_crashes, max_stalls)
    if not well then
      outcome = 'error ' .. tostring(type(outcome) == 'table' and outcome.err or outcome)
    end
    answer[#answer + 1] = id
    answer[#answer + 1] = outcome
  end
  for id, doom in pairs(dooms or {}) do
    pcall(note_killed, id, doom[1])
  end
  write_ends()
  write_counts()
  if call('SCARD', held) == 0 then
    call('ZREM', R .. ':workers', worker)
    call('UNLINK', R .. ':w:' .. worker, held, R .. ':wb:' .. worker)
  end
  return answer
end
