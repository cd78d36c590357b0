--[[ What every script of the store shares: the layout of the keys, the moves of a job, and the functions that make
them. It is put between a script's first line (its flags) and its body.

KEYS[1] is the root R = "mlq:{namespace}". Every other key is computed from it; the braces keep all keys of a namespace
in one hash slot. Names of namespaces, queues and lanes arrive percent-encoded outside [A-Za-z0-9._-], so ":" parts them.
Times are the server's, in Unix milliseconds. Fields have one letter because a hash of many short fields stays compact.

  R:seq            string  number of the newest job; numbers order jobs by creation
  R:j:ID           hash    the record (fields below)
  R:b:ID           string  the body (arguments and options, MessagePack) when it has more than 64 bytes, else field b
  R:r:ID           hash    the result when it has more than 64 bytes, else field r of the record: s short, f full,
                           c content type, n number of chunks, z size in bytes, k attempt that wrote the chunks
  R:e:ID           string  the last error (MessagePack)
  R:at:ID          list    attempts that did not succeed (MessagePack), newest last, at most 50
  R:ck:ID          hash    the checkpoint: v value, or n number of chunks; z size, g generation
  R:x:ID:WHAT:I    string  chunk I of a blob; WHAT is r<attempt> (result) or c<generation> (checkpoint)
  R:wt:ID          set     bells of those who wait for the job: "e<bell>" for its end, "a<bell>" for every change
  R:s:S:QUEUE:LANE zset    the shelf of the jobs of one state, queue and lane. Score: the job's number; for the states q
                           and i (the waiting ones) priority * 2^42 + number. S is one of q i w s d c
  R:shelves        set     "S:QUEUE:LANE" of the shelves that exist or did
  R:sched          zset    jobs in state w by the time when they are due
  R:exp            zset    ended jobs by the time when their record may go
  R:tag:TAG        zset    jobs that carry a tag, by number
  R:workers        zset    worker incarnations by the end of their lease
  R:w:WORKER       hash    info (MessagePack, written at its start); o nonce of its last turn, and what that answered:
                           oj jobs, os refusals; iso the job that it must run alone
  R:h:WORKER       set     jobs that it holds: exactly those in state r with w = WORKER
  R:bell:QUEUE:LANE list   doorbell of a lane: at most one token; idle workers block on it
  R:wb:BELL        list    a waiter's or a worker's own bell; tokens say what happened
  R:actors         hash    the queue of every actor that a worker has declared, for who submits by name
  R:sweep          hash    owner and until: who sweeps; last: when it did
  R:g:UUID         set     children of a group that have completed; R:g:UUID:n holds how many there are
  R:data:KEY       string  what jobs stored for each other

A lane holds the jobs that the same workers can run: it is the actor's name, or the actor's name, "|" and a list of
functions. A worker asks for lanes that it can run, so a job that nobody can run blocks nothing.

Fields of the record: s state, q queue, a actor, l lane (when it is not the actor), n number, t created, p priority
(when not 0), b body, d due, k attempt (starts so far; never goes down), y retries, x crashes, z stalls, w worker,
u started, f finished, v progress value (MessagePack), V progress note, r result, g dead reason, c time when cancelling
was asked for, P parent, G tags (MessagePack), T result ttl in ms (-1 for ever), X most crashes, Z most stalls,
W 1 while somebody waits (R:wt:ID), K 1 while there is a checkpoint.

States: q queued (also in shelf i: queued, to be run alone), w scheduled, r running, s succeeded, d dead, c cancelled.

  transition   by                from  to                attempt        with the cancel flag set
  create       enqueue, settle   -     q, or w if due    0              -
  promote      turn, sweep       w     q                 -              (cancel ended it before)
  fetch        turn              q     r                 +1             (cancel ended it before)
  finish       turn, settle      r     s                 must be equal  c
  reschedule   turn, settle      r     w, or q at once   must be equal  c
  bury         turn, settle      r     d                 must be equal  c
  give back    turn, settle      r     q                 must be equal  c
  release      release, sweep    r     q, or d           worker equal   c
  cancel       cancel            q w   c                 -              -
                                 r     r, flag set       -              -
  retry        retry             d c   q                 -              cleared
  remove       sweep, remove     any but r -> gone       -              -

A move checks the state, and where the table says so the attempt or the worker, before it writes. The state itself is
the last thing written, so that a move which fails half-way (a script has no rollback) can be made again. ]]

local R = KEYS[1]
local call = redis.call
local PRIORITY = 4398046511104 -- 2^42
local INLINE = 64
local ISOLATE_AFTER = 2
local ENDED = { s = true, d = true, c = true }

local clock = call('TIME')
local NOW = clock[1] * 1000 + math.floor(clock[2] / 1000)

local function jkey(id)
  return R .. ':j:' .. id
end

local shelved = {}

local function shelve(state, rec, id)
  local name = state .. ':' .. rec.queue .. ':' .. rec.lane
  local score = rec.number
  if state == 'q' or state == 'i' then
    score = rec.priority * PRIORITY + score
  end
  call('ZADD', R .. ':s:' .. name, score, id)
  if not shelved[name] then
    shelved[name] = true
    call('SADD', R .. ':shelves', name)
  end
end

local function unshelve(state, rec, id)
  call('ZREM', R .. ':s:' .. state .. ':' .. rec.queue .. ':' .. rec.lane, id)
end

local function ring(queue, lane)
  local key = R .. ':bell:' .. queue .. ':' .. lane
  if call('EXISTS', key) == 0 then
    call('RPUSH', key, 1)
  end
end

local function ring_own(bell, token)
  local key = R .. ':wb:' .. bell
  call('RPUSH', key, token)
  call('PEXPIRE', key, 120000)
end

-- The record's fields that moves need, or nil when there is none.
local function load(id)
  local f = call('HMGET', jkey(id), 's', 'k', 'w', 'q', 'a', 'l', 'n', 'p', 'c', 'W', 'K', 'T', 'x', 'y', 'z', 'u',
    'X', 'Z', 'i')
  if not f[1] then
    return nil
  end
  return {
    state = f[1], attempt = tonumber(f[2] or 0), worker = f[3], queue = f[4], actor = f[5], lane = f[6] or f[5],
    number = tonumber(f[7]), priority = tonumber(f[8] or 0), cancel = f[9], watched = f[10], checkpoint = f[11],
    ttl = tonumber(f[12] or -1), crashes = tonumber(f[13] or 0), retries = tonumber(f[14] or 0),
    stalls = tonumber(f[15] or 0), started = f[16], max_crashes = tonumber(f[17]), max_stalls = tonumber(f[18]),
    alone = f[19],
  }
end

-- Ring those who wait: all of them at the end, else only those who asked for every change.
local function tell(id, rec, ended)
  if not rec.watched then
    return
  end
  local key = R .. ':wt:' .. id
  for _, bell in ipairs(call('SMEMBERS', key)) do
    if ended or string.sub(bell, 1, 1) == 'a' then
      ring_own(string.sub(bell, 2), id)
    end
  end
  if ended then
    call('UNLINK', key)
  end
end

local function drop_chunks(id, what, n)
  for i = 0, n - 1 do
    call('UNLINK', R .. ':x:' .. id .. ':' .. what .. ':' .. i)
  end
end

local function drop_checkpoint(id)
  local ck = call('HMGET', R .. ':ck:' .. id, 'n', 'g')
  if ck[1] then
    drop_chunks(id, 'c' .. ck[2], tonumber(ck[1]))
  end
  call('UNLINK', R .. ':ck:' .. id)
end

local function drop_result(id)
  if call('TYPE', R .. ':r:' .. id).ok == 'hash' then
    local r = call('HMGET', R .. ':r:' .. id, 'n', 'k')
    if r[1] then
      drop_chunks(id, 'r' .. r[2], tonumber(r[1]))
    end
  end
  call('UNLINK', R .. ':r:' .. id)
end

-- One line of the job's history: an attempt that did not succeed.
local function note_attempt(id, rec, how, err)
  local key = R .. ':at:' .. id
  call('RPUSH', key, cmsgpack.pack({ rec.attempt, rec.worker or '', tonumber(rec.started or 0), NOW, how, err or '' }))
  if call('LLEN', key) > 50 then
    call('LPOP', key)
  end
end

local function watched_fields(rec, ended)
  return (rec.watched and ended) and 'W' or nil
end

-- Ends a job. `fields` are further fields of the record, flat. The state is written last.
local function finish(id, rec, state, fields, ttl)
  shelve(state, rec, id)
  if ttl >= 0 then
    call('ZADD', R .. ':exp', NOW + ttl, id)
  end
  if rec.checkpoint and state ~= 'd' then
    drop_checkpoint(id)
    call('HDEL', jkey(id), 'K')
  end
  if rec.state == 'r' then
    call('SREM', R .. ':h:' .. rec.worker, id)
  end
  fields[#fields + 1] = 'f'
  fields[#fields + 1] = NOW
  fields[#fields + 1] = 's'
  fields[#fields + 1] = state
  call('HSET', jkey(id), unpack(fields))
  local gone = watched_fields(rec, true)
  if gone then
    call('HDEL', jkey(id), gone)
  end
  tell(id, rec, true)
end

local function cancelled(id, rec)
  drop_result(id)
  finish(id, rec, 'c', { 'c', rec.cancel or NOW }, rec.ttl)
end

-- Puts a job back where it stood in its lane, or where it waits to be run alone.
local function requeue(id, rec, fields)
  local shelf = rec.crashes >= ISOLATE_AFTER and 'i' or 'q'
  shelve(shelf, rec, id)
  if rec.state == 'r' then
    call('SREM', R .. ':h:' .. rec.worker, id)
  end
  if shelf == 'i' then
    fields[#fields + 1] = 'i'
    fields[#fields + 1] = 1
  elseif rec.alone then
    call('HDEL', jkey(id), 'i')
  end
  fields[#fields + 1] = 's'
  fields[#fields + 1] = 'q'
  call('HSET', jkey(id), unpack(fields))
  ring(rec.queue, rec.lane)
  tell(id, rec, false)
  return shelf
end

local function schedule(id, rec, due, fields)
  shelve('w', rec, id)
  call('ZADD', R .. ':sched', due, id)
  if rec.state == 'r' then
    call('SREM', R .. ':h:' .. rec.worker, id)
  end
  fields[#fields + 1] = 'd'
  fields[#fields + 1] = due
  fields[#fields + 1] = 's'
  fields[#fields + 1] = 'w'
  call('HSET', jkey(id), unpack(fields))
  -- Idle workers sleep until the job that was the earliest so far: wake one to look again.
  if call('ZRANGE', R .. ':sched', 0, 0)[1] == id then
    ring(rec.queue, rec.lane)
  end
  tell(id, rec, false)
end

-- item: id, queue, actor, lane, priority, delay (-1: none), due (-1: none), body, ttl, parent, tags, most crashes,
-- most stalls. Returns 1, or 0 when the id exists already (then nothing changes: submitting is idempotent).
local function create(item)
  local id, queue, actor, lane, priority = item[1], item[2], item[3], item[4], item[5]
  local delay, due, body, ttl, tags = item[6], item[7], item[8], item[9], item[11]
  assert(type(id) == 'string' and type(queue) == 'string' and type(actor) == 'string' and type(lane) == 'string'
    and type(priority) == 'number' and type(delay) == 'number' and type(due) == 'number' and type(body) == 'string'
    and type(ttl) == 'number', 'malformed job')
  local key = jkey(id)
  if call('EXISTS', key) == 1 then
    return 0
  end
  local rec = {
    state = '-', queue = queue, actor = actor, lane = lane, priority = priority, number = call('INCR', R .. ':seq'),
    crashes = 0,
  }
  local fields = { 'q', queue, 'a', actor, 'n', rec.number, 't', NOW, 'T', ttl }
  local function also(name, value)
    fields[#fields + 1] = name
    fields[#fields + 1] = value
  end
  if lane ~= actor then also('l', lane) end
  if priority ~= 0 then also('p', priority) end
  if item[10] and item[10] ~= '' then also('P', item[10]) end
  if item[12] then also('X', item[12]) end
  if item[13] then also('Z', item[13]) end
  if #body <= INLINE then
    also('b', body)
  else
    call('SET', R .. ':b:' .. id, body)
  end
  if tags and #tags > 0 then
    also('G', cmsgpack.pack(tags))
    for _, tag in ipairs(tags) do
      call('ZADD', R .. ':tag:' .. tag, rec.number, id)
    end
  end
  if delay >= 0 then
    due = NOW + delay
  end
  if due > NOW then
    schedule(id, rec, due, fields)
  else
    requeue(id, rec, fields)
  end
  return 1
end

-- Moves jobs that are due from the schedule into their lanes; at most `limit` a call. Returns ms until the next, or -1.
local function promote(limit)
  for _, id in ipairs(call('ZRANGEBYSCORE', R .. ':sched', '-inf', NOW, 'LIMIT', 0, limit)) do
    local rec = load(id)
    if rec and rec.state == 'w' then
      unshelve('w', rec, id)
      requeue(id, rec, {})
    end
    call('ZREM', R .. ':sched', id)
  end
  local first = call('ZRANGE', R .. ':sched', 0, 0, 'WITHSCORES')
  if not first[2] then
    return -1
  end
  return math.max(0, tonumber(first[2]) - NOW)
end

local function write_progress(id, rec, value, note)
  if value then
    call('HSET', jkey(id), 'v', value, 'V', note or '')
    tell(id, rec, false)
  end
end

-- A group's child has ended well: when it was the last one, the group's callbacks are created.
local function complete_child(id, group)
  local key = R .. ':g:' .. group[1]
  local parties = tonumber(call('GET', key .. ':n') or -1)
  if parties < 0 then
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
    return cancelled(id, rec)
  end
  local key = R .. ':r:' .. id
  if s[8] then
    call('UNLINK', key)
    fields = { 'r', s[8] }
  else
    local result = { 's', s[9], 'c', s[10], 'z', s[13] }
    if s[12] > 0 then
      for i = 0, s[12] - 1 do
        if call('PERSIST', R .. ':x:' .. id .. ':r' .. rec.attempt .. ':' .. i) == 0 then
          error('chunk ' .. i .. ' of the result is gone')
        end
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

-- s: ..., delay in ms, error, 1 when it counts as a retry
function settle_verbs.r(id, rec, s)
  if rec.cancel then
    return cancelled(id, rec)
  end
  assert(type(s[8]) == 'number', 'malformed delay')
  call('SET', R .. ':e:' .. id, s[9])
  note_attempt(id, rec, 'failed', s[9])
  local fields = { 'y', rec.retries + s[10] }
  if s[8] > 0 then
    schedule(id, rec, NOW + s[8], fields)
  else
    requeue(id, rec, fields)
  end
end

-- s: ..., reason, error
function settle_verbs.b(id, rec, s)
  if rec.cancel then
    return cancelled(id, rec)
  end
  assert(type(s[8]) == 'string' and type(s[9]) == 'string', 'malformed reason or error')
  drop_result(id)
  call('SET', R .. ':e:' .. id, s[9])
  note_attempt(id, rec, s[8], s[9])
  finish(id, rec, 'd', { 'g', s[8] }, -1)
end

-- Given back unharmed: it did not start, or the worker is being drained.
function settle_verbs.l(id, rec)
  if rec.cancel then
    return cancelled(id, rec)
  end
  requeue(id, rec, {})
end

-- The job took note of its cancelling and ended.
function settle_verbs.c(id, rec)
  cancelled(id, rec)
end

local function settle_one(s)
  local id, attempt, verb = s[1], s[2], s[3]
  if type(id) ~= 'string' or type(attempt) ~= 'number' or not settle_verbs[verb] then
    error('malformed settle')
  end
  local rec = load(id)
  if not rec or rec.state ~= 'r' or rec.attempt ~= attempt then
    return 'stale'
  end
  write_progress(id, rec, s[4], s[5])
  -- Children before the parent's end: made again, they exist already and nothing happens.
  if s[6] then
    for _, item in ipairs(s[6]) do
      create(item)
    end
  end
  if s[7] and not rec.cancel then
    complete_child(id, s[7])
  end
  settle_verbs[verb](id, rec, s)
  return 'ok'
end

-- Settles each job on its own; answers, flat, position and text of those that did not go well.
local function settle(first, last)
  local refused = {}
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
  return refused
end

-- Takes a running job from a worker that is gone. reason: crash, stall or drain. Returns what became of the job.
local function release_one(id, worker, reason, alone, err, max_crashes, max_stalls)
  local rec = load(id)
  if not rec or rec.state ~= 'r' or rec.worker ~= worker then
    call('SREM', R .. ':h:' .. worker, id)
    return 'gone'
  end
  if rec.cancel then
    cancelled(id, rec)
    return 'cancelled'
  end
  local fields = {}
  local dead = nil
  if reason == 'crash' then
    rec.crashes = rec.crashes + 1
    fields = { 'x', rec.crashes }
    -- Only a crash suffered alone proves that it was this job.
    if alone and rec.crashes >= (rec.max_crashes or max_crashes) then
      dead = 'crashed'
    end
  elseif reason == 'stall' then
    rec.stalls = rec.stalls + 1
    fields = { 'z', rec.stalls }
    if rec.stalls >= (rec.max_stalls or max_stalls) then
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

-- Takes every job from a worker incarnation and forgets it. Returns, flat, ids and what became of them.
local function release_worker(worker, reason, err, max_crashes, max_stalls)
  local held = R .. ':h:' .. worker
  local ids = call('SMEMBERS', held)
  local answer = {}
  for _, id in ipairs(ids) do
    local well, outcome = pcall(release_one, id, worker, reason, #ids == 1, err, max_crashes, max_stalls)
    if not well then
      outcome = 'error ' .. tostring(type(outcome) == 'table' and outcome.err or outcome)
    end
    answer[#answer + 1] = id
    answer[#answer + 1] = outcome
  end
  if call('SCARD', held) == 0 then
    call('ZREM', R .. ':workers', worker)
    call('UNLINK', R .. ':w:' .. worker, held, R .. ':wb:' .. worker)
  end
  return answer
end

-- Forgets a job that does not run, with all that belongs to it.
local function remove(id)
  local rec = load(id)
  if rec then
    if rec.state == 'r' then
      return 0
    end
    unshelve(rec.state, rec, id)
    unshelve('i', rec, id)
    local tags = call('HGET', jkey(id), 'G')
    if tags then
      for _, tag in ipairs(cmsgpack.unpack(tags)) do
        call('ZREM', R .. ':tag:' .. tag, id)
      end
    end
    if not ENDED[rec.state] then
      tell(id, rec, true)
    end
  end
  drop_result(id)
  drop_checkpoint(id)
  call('ZREM', R .. ':sched', id)
  call('ZREM', R .. ':exp', id)
  call('UNLINK', jkey(id), R .. ':b:' .. id, R .. ':e:' .. id, R .. ':at:' .. id, R .. ':wt:' .. id)
  return rec and 1 or 0
end
