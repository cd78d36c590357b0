--[[ What every script of the store shares: the layout of the keys, the moves of a job, and a few names. A script is
put together from its first line (its flags), this file, the parts that its second line names, and its body; parts are
kept apart because the server makes each function anew at every call.

KEYS[1] is the root R = "mlq:{namespace}". Every other key is computed from it; the braces keep all keys of a namespace
in one hash slot. Names of namespaces, queues and lanes arrive percent-encoded outside [A-Za-z0-9._-], so ":" parts them.
Times are the server's, in Unix milliseconds. Fields have one letter because a hash of many short fields stays compact.

  R:seq            string  number of the newest job; numbers order jobs by creation
  R:j:ID           hash    the record (fields below)
  R:b:ID           string  the body (arguments and options, MessagePack) when it has more than 64 bytes, else field b;
                           for one in chunks there is a reference in field b (mlqueue/store/chunks.py)
  R:r:ID           hash    the result when it has more than 64 bytes, else field r of the record: s short, f full,
                           c content type, n number of chunks, z size in bytes, k attempt that wrote the chunks
  R:e:ID           string  the last error (MessagePack)
  R:at:ID          list    attempts that did not succeed (MessagePack), newest last, at most 50
  R:ch:ID          list    ids of the jobs that the job submitted while its record was there, newest last, at most 1,000
  R:ck:ID          hash    the checkpoint: v value, or n number of chunks; z size, g generation, a attempt that saved it,
                           t when
  R:lg:ID          list    lines of the job's log, oldest first (MessagePack: time, attempt, stream or level, text); field o
  R:me:ID          hash    the job's metrics: by name how many values have one point (uint32), how many values there were
                           (uint64), then of each point step, value and time (Unix seconds), as little-endian doubles
  R:x:ID:WHAT:I    string  chunk I of a blob; WHAT is r<attempt> (result), c<generation> (checkpoint) or a<generation>
                           (body); until it belongs to a job it has a time to live
  R:wt:ID          set     bells of those who wait for the job: "e<bell>" for its end, "a<bell>" for every change
  R:cb:ID          hash    the callback of a job: u URL; s how it stands: p to be delivered, d delivered, f failed. Its
                           webhook: w URL, e events (letters as in field C), h how the newest event stands (as s), i the
                           delivery of that, m the shortest time between two events of progress in ms, n when the newest
                           of those is due
  R:ca:ID          list    tries to deliver them (MessagePack), newest last, at most 50
  R:s:S:QUEUE:LANE zset    the shelf of the jobs of one state, queue and lane. Score: the job's number; for the states q
                           and i (the waiting ones) priority * 2^42 + number. S is one of q i w s d c
  R:shelves        set     "S:QUEUE:LANE" of the shelves that exist or did
  R:sched          zset    jobs in state w by the time when they are due
  R:exp            zset    ended jobs by the time when their record may go
  R:dead           zset    dead jobs by the time of their death
  R:late           zset    running jobs that have a timeout, by the time when it is over
  R:qt             zset    jobs that have not begun and have a queue timeout, by the time when it is over
  R:reapers        hash    timeouts bound to this namespace, by who bound them: timeout in ms, most timeouts, until when
                           the bond holds (MessagePack)
  R:fl             set     "QUEUE:LANE" of lanes with a list of functions in which jobs wait or waited
  R:unserved       hash    since when workers of its queue live and none has the functions of a lane
  R:tag:TAG        zset    jobs that carry a tag, by number
  R:workers        zset    worker incarnations by the end of their lease
  R:w:WORKER       hash    info (MessagePack, written at its start); o nonce of its last turn, and what that answered:
                           oj jobs, os refusals; dn and dj the same of its last claim of callbacks;
                           iso the job that it must run alone; pz the queues that are paused (as in R:paused);
                           vit what its process takes (MessagePack), vat when that was told; ask what is asked of it
  R:h:WORKER       set     jobs that it holds: exactly those in state r with w = WORKER
  R:bell:QUEUE:LANE list   doorbell of a lane: at most one token; idle workers block on it
  R:wb:BELL        list    a waiter's or a worker's own bell; tokens say what happened
  R:actors         hash    of every actor that a worker has declared its queue, and behind spaces the names of the keys
                           that it makes of the arguments: for who submits by name
  R:http           hash    what web processes are told of every actor that may be called over HTTP (MessagePack)
  R:keys           hash    API keys by their id (MessagePack; of the secret its SHA-256 alone)
  R:pf             hash    posted functions by name (MessagePack: place, serial, when signed, when posted, code, signature,
                           nonce); R:pfs their newest serials, removed ones included; R:pfe why a worker could not load
                           one (MessagePack: serial, text, worker, when); R:pfv counts their changes
  R:once:KEY       string  what an idempotency key came with: fingerprint of the request, ids of the jobs (MessagePack)
  R:ev             stream  what happened to jobs, while somebody listens: field e of each entry is an event (part_events.lua,
                           MessagePack); one whose kind is "-" says that before it nobody did
  R:evl            string  there while somebody listens; who does renews it
  R:m              hash    counters (part_counts.lua): e:ACTOR:STATE[:REASON] ends, x:ACTOR crashes, z:ACTOR stalls, o:ACTOR
                           timeouts, y:ACTOR retries, c:STATE tries to deliver callbacks; w:ACTOR:BUCKET and
                           r:ACTOR:BUCKET how long jobs waited and ran, w:ACTOR:sum and r:ACTOR:sum that in ms
  R:sweep          hash    owner and until: who sweeps; last: when it did; course: the newest stretch of R:course
  R:course         list    how the namespace fared, newest first: an entry for each stretch of time (part_course.lua)
  R:paused         hash    queues of which nothing is started: since when and who said so (MessagePack)
  R:acts           list    what people did by the dashboard (note_act.lua), newest first, a bounded number
  R:g:UUID         set     children of a group that have completed; R:g:UUID:n holds how many there are
  R:mig            set     jobs that were taken off to be made in another store and have not arrived yet; of each
  R:mig:j:ID       string  what it was (MessagePack, migrate_out.lua). Its chunks stay under R:x
  R:mig:own        string  token of who migrates from here; R:mig:ownFROM of who migrates to here from a store
  R:mig:id         string  what this store is called where its jobs go
  R:mig:in:FROM    set     jobs that have come from a store which may not know it yet
  R:mig:data:FROM  hash    generation of data by their key, as they came from a store
  R:mig:g          hash    how many children the groups have that are counted elsewhere now (R:g:UUID:n is -2)
  R:mig:gl         list    their children that have completed here since (MessagePack)
  R:data:KEY       hash    what jobs stored for each other: v value, or n number of chunks; z size, g generation
  R:data:KEY:G:I   string  chunk I of generation G of it
  R:pools          hash    how pools that prepare batches fare, by run: when it was told, and what (MessagePack)
  R:lim            hash    how many slots limits have: NAME what was set by hand, ~NAME what a worker has told
  R:lim:a          hash    limits of actors (MessagePack): resources as {name, how many}, 1 when so many jobs run at a time
  R:lim:s:NAME     hash    the slots of a limit that are in use: who holds each, "ID ATTEMPT"
  R:lim:used       set     names of limits of which slots are in use
  R:lim:next:NAME  string  place and need of the job that was called when a slot became free, for a moment
  R:lim:lent       hash    jobs that may be lent slots, by those who wait for them: who does
  R:park           set     names of limits that somebody waits for
  R:park:NAME      zset    who waits for a limit: "QUEUE:LANE", or "QUEUE:LANE GROUP" with the group's turn
  R:fair:g:LANE:GROUP zset  waiting jobs of a group, scored as in their shelf; LANE is QUEUE:LANE
  R:fair:t:LANE    zset    the groups of a lane that may start a job, by their turn: those without a concurrency key
  R:fair:k:LANE    zset    and those with one
  R:fair:n         hash    how many turns there were in each lane
  R:uk:ACTOR:KEY   string  the job that came with a unique key last
  R:datas          zset    the keys of such data (quoted) by the time when they expire, +inf for never

A lane holds the jobs that the same workers can run: it is the actor's name, or the actor's name, "|" and a list of
functions. A worker asks for lanes that it can run, so a job that nobody can run blocks nothing.

Where jobs take turns the lane ends in "@", behind its "|": "train|@" (part_limits.lua).

A callback is a job of its own, in the queue mlqueue.callbacks: the script that ends a job creates it (its id is the
job's, ".cb" and the job's number, its parent the job), and workers deliver it beside their threads. So is an event for a
webhook, created by the script that makes the move (".wh" and, for an end, the job's number, else r or p and the attempt);
its arguments are the event, when it was, and the attempt.

Fields of the record: s state, q queue, a actor, l lane (when it is not the actor), n number, t created, N when it
was retried by hand last, p priority
(when not 0), b body, d due, k attempt (starts so far; never goes down), y retries, x crashes, z stalls, w worker,
u started, f finished, v progress value (MessagePack), V progress note, r result, g dead reason, c time when cancelling
was asked for, P parent, G tags (MessagePack), T result ttl in ms (-1 for ever), X most crashes, Z most stalls,
W 1 while somebody waits (R:wt:ID), K 1 while there is a checkpoint, C what is called (R:cb:ID): 1 its
callback, s d c its webhook at this end, r at a start, p at progress, J timeout in
ms, O timeouts so far, A the job that it waits for, h how its cancelling ended it,
Q queue timeout in ms, U when that is over (with the attempt behind it that has begun since), j by how many ms the running
attempt was prolonged, and the nonce of the last time,
m attempt that logged metrics last, o how many lines were dropped from its log and how many bytes the others have, the
attempt that wrote last and how many lines that has written (MessagePack), e what its last attempt used (MessagePack: CPU
time in ms, most memory, most memory of GPUs, whether it ran alone, attempt),
R the checkpoint that its last attempt began from (attempt that saved it, when, size),
H slots that it holds, or held when it ended (MessagePack), E its group (concurrency key, "/", what it takes turns by),
D its unique key,
M nonce of the call that retried it by hand last, Y nonce of the call that started it for who waits.

States: q queued (also in shelf i: queued, to be run alone), w scheduled, r running, s succeeded, d dead, c cancelled.

  transition   by                from  to                attempt        with the cancel flag set
  create       enqueue, settle   -     q, or w if due    0              -
  promote      turn, sweep       w     q                 -              (cancel ended it before)
  fetch        turn, await       q     r                 +1             (cancel ended it before)
  finish       turn, settle      r     s                 must be equal  c
  reschedule   turn, settle      r     w, or q at once   must be equal  c
  bury         turn, settle      r     d                 must be equal  c
  give back    turn, settle      r     q, or w if later  must be equal  c
  release      release, sweep    r     q, or d           worker equal   c
  cancel       cancel            q w   c                 -              -
  flag         cancel            r     r, flag set       -              -
  heed         turn, settle      r     c                 must be equal  c
  time out     sweep             r     q, or d           -              c
  give up      sweep             q     d                 -              -
  expire       turn, sweep       q     d                 -              -
  end          release           r     q, or d           must be equal  c
  retry        retry             d c   q                 -              cleared
  remove       sweep, remove     any but r -> gone       -              -

A move checks the state, and where the table says so the attempt or the worker, before it writes. The state itself is
the last thing written, so that a move which fails half-way (a script has no rollback) can be made again. ]]

local R = KEYS[1]
local call = redis.call
local PRIORITY = 4398046511104 -- 2^42

local clock = call('TIME')
local NOW = clock[1] * 1000 + math.floor(clock[2] / 1000)

local function jkey(id)
  return R .. ':j:' .. id
end
