-- Limits: which jobs may start, the slots that they hold, and who starts when slots are given back.
--
-- A job needs slots of the resources of its actor and, where its actor's jobs may not run all at once, of the limit
-- "@ACTOR", or "@ACTOR/KEY" when it has a concurrency key. Who finds a limit full is parked in the same call; who gives
-- slots back rings the lanes that are parked there. Nobody asks again meanwhile.
--
-- Where jobs take turns (their lane ends in "@") each value of what they are turned by, with each concurrency key, is a
-- group: a sorted set of the waiting jobs, scored as their shelf is, and a place in a ring of the lane. Groups with a
-- key have a ring of their own: what the others wait for together need not keep them from starting.

-- For how many ms a slot that is free waits for a worker that was rung for it, in whose lane the job stands that comes
-- first.
local CALLED = 100

-- All of it is made in one function, where limits are in use only: each function costs at every call.
make_limits = function()
  local made, specs, claimed = {}, {}, {}
  -- What jobs of an actor need that stand in no group.
  local usual = {}
  -- What was read in this call: the capacities, and who is called for a limit (false: nobody). How often slots
  -- were given or claimed.
  local capacities, called, grabs = {}, {}, 0
  -- The slots that are held of limits which jobs were given slots of in this call, the first that may be free, and how
  -- many slots are held of any limit.
  local held_of, lowest, in_use = {}, {}, {}
  -- What is written for many jobs at once: slots that were given, and such that are to be freed, by limit and flat with
  -- their holders. Nil where each is written when it is.
  local given_of, freed_of = nil, nil

  -- The slots of a limit were changed not by `grab`: what is known of them holds no more.
  local function forget(name)
    held_of[name], in_use[name] = nil, nil
  end

  local function used(name)
    if not in_use[name] then
      in_use[name] = call('HLEN', R .. ':lim:s:' .. name)
    end
    return in_use[name]
  end

  local function grouped(lane)
    return string.sub(lane, -1) == '@'
  end

  local function group_key(rec, group)
    return R .. ':fair:g:' .. rec.queue .. ':' .. rec.lane .. ':' .. group
  end

  local function ring_key(lane, keyed)
    return R .. (keyed and ':fair:k:' or ':fair:t:') .. lane
  end

  local function ring_of(rec, group)
    return ring_key(rec.queue .. ':' .. rec.lane, string.sub(group, 1, 1) ~= '/')
  end

  -- What a job needs: names of limits, and how many slots of each. group: as the record has it, or nil.
  function made.needs(actor, group)
    if not group and usual[actor] then
      return usual[actor]
    end
    local spec = specs[actor]
    if not spec then
      local packed = call('HGET', R .. ':lim:a', actor)
      spec = packed and cmsgpack.unpack(packed) or { {}, 0 }
      specs[actor] = spec
    end
    local key = group and string.match(group, '^[^/]*') or ''
    local needs = {}
    for i, need in ipairs(spec[1]) do
      needs[i] = need
    end
    if spec[2] == 1 or key ~= '' then
      needs[#needs + 1] = { '@' .. actor .. (key == '' and '' or '/' .. key), 1 }
    end
    if not group then
      usual[actor] = needs
    end
    return needs
  end

  function made.capacity(name)
    if not capacities[name] then
      local limit = string.match(name, '^[^/]*')
      local set = call('HMGET', R .. ':lim', limit, '~' .. limit)
      capacities[name] = tonumber(set[1] or set[2] or 1)
    end
    return capacities[name]
  end

  -- The name of a limit that has no room, or nil. score: where the lane stands; who stands before it and waits for
  -- slots, of which there may be some but too few, or whose worker has been rung for them, gets the next ones. Of several
  -- it is the one that keeps others from least: one that never has so many, else how many of the actor's jobs may run.
  function made.lacking(needs, score)
    for _, need in ipairs(needs) do
      if need[2] > made.capacity(need[1]) then
        return need[1], need[2]
      end
    end
    for i = #needs, 1, -1 do
      local need = needs[i]
      local name = need[1]
      if claimed[name] and claimed[name] < score then
        return name, need[2]
      end
      local room = made.capacity(name) - used(name)
      if room < need[2] then
        return name, need[2]
      end
      if called[name] == nil then
        called[name] = call('GET', R .. ':lim:next:' .. name)
      end
      local who = called[name]
      if who and tonumber(string.match(who, '^%S+')) < score and room < need[2] + string.match(who, '%d+$') then
        made.again = math.max(1, call('PTTL', R .. ':lim:next:' .. name))
        return name, need[2]
      end
    end
  end

  -- Whether the queue timeout of a waiting job is over: it holds up nobody while it lacks slots, but ends at once.
  local function over(id)
    local at = tonumber(call('HGET', jkey(id), 'U'))
    return at and at <= NOW
  end

  -- Gives an attempt of a job the slots that it needs, and returns them packed: for each limit its name, the slots, and
  -- where they are only lent the attempts that get them back, the first of them that runs still. lent: by name the slots
  -- and these attempts.
  function made.grab(id, attempt, needs, lent)
    local slots = {}
    grabs = grabs + 1
    for i, need in ipairs(needs) do
      local name = need[1]
      local key, taken, given, lenders = R .. ':lim:s:' .. name, nil, {}, nil
      local first = true
      if lent and lent[name] then
        given, lenders = lent[name][1], lent[name][2]
      elseif string.sub(name, 1, 1) == '@' then
        given = { id } -- which one it is matters to nobody
      else
        if not held_of[name] then
          local slots_held = {}
          for _, slot in ipairs(call('HKEYS', key)) do
            slots_held[slot] = true
          end
          held_of[name], lowest[name] = slots_held, 0
        end
        taken = held_of[name]
        first = not next(taken)
        local slot = lowest[name]
        while #given < need[2] do
          local number = tostring(slot)
          if not taken[number] then
            given[#given + 1] = number
            taken[number] = true
          end
          slot = slot + 1
        end
        lowest[name] = slot
      end
      local own, into = id .. ' ' .. attempt, {}
      if given_of and not lenders then
        into = given_of[name] or into
        given_of[name] = into
      end
      for _, slot in ipairs(given) do
        into[#into + 1], into[#into + 2] = slot, own
      end
      if not given_of or lenders then
        call('HSET', key, unpack(into))
      end
      if not lenders then
        in_use[name] = in_use[name] and in_use[name] + #given
      end
      if first then
        call('SADD', R .. ':lim:used', name)
      end
      if called[name] ~= false then
        call('UNLINK', R .. ':lim:next:' .. name)
        called[name] = false
      end
      slots[i] = { name, given, lenders }
    end
    return slots[1] and cmsgpack.pack(slots)
  end

  -- From now on to `write_given` slots that jobs are given are gathered. Nothing else looks at them meanwhile.
  function made.gather_given()
    given_of = {}
  end

  function made.write_given()
    for name, slots in pairs(given_of) do
      -- A part at a time: what a call can be given is bounded.
      for i = 1, #slots, 1000 do
        call('HSET', R .. ':lim:s:' .. name, unpack(slots, i, math.min(i + 999, #slots)))
      end
    end
    given_of = nil
  end

  -- From now on to `write_freed` slots that jobs give back are gathered. Nobody is given any meanwhile.
  function made.gather_freed()
    freed_of = {}
  end

  -- A limit has slots again that were held.
  local function freed(name)
    forget(name)
    made.open(name)
    if call('EXISTS', R .. ':lim:s:' .. name) == 0 then
      call('SREM', R .. ':lim:used', name)
    end
  end

  function made.write_freed()
    for name, slots in pairs(freed_of) do
      local key = R .. ':lim:s:' .. name
      for i = 1, #slots, 500 do
        local asked, owned = {}, {}
        for j = i, math.min(i + 499, #slots) do
          asked[#asked + 1] = slots[j][1]
        end
        for j, holder in ipairs(call('HMGET', key, unpack(asked))) do
          if holder == slots[i + j - 1][2] then
            owned[#owned + 1] = asked[j]
          end
        end
        if owned[1] then
          call('HDEL', key, unpack(owned))
        end
      end
      freed(name)
    end
    freed_of = nil
  end

  -- Those who wait for a limit may look again.
  function made.open(name)
    local key = R .. ':park:' .. name
    local parked = call('ZRANGE', key, 0, -1, 'WITHSCORES')
    if not parked[1] then
      return
    end
    local first, lowest = nil, math.huge
    for i = 1, #parked, 2 do
      local queue, lane, group = string.match(parked[i], '^([^:]*):([^ ]*) ?(.*)$')
      if group ~= '' then
        call('ZADD', ring_of({ queue = queue, lane = lane }, group), parked[i + 1], group)
      else
        local head = call('ZRANGE', R .. ':s:q:' .. queue .. ':' .. lane, 0, 0, 'WITHSCORES')
        if head[1] and tonumber(head[2]) < lowest then
          first, lowest = parked[i], tonumber(head[2])
        end
      end
      ring(queue, lane)
    end
    if first then
      -- Its worker has a free thread. Who gives the slot back would always be the first to take it.
      for _, need in ipairs(made.needs(string.match(first, ':([^|]*)'))) do
        if need[1] == name and need[2] <= made.capacity(name) then
          call('SET', R .. ':lim:next:' .. name, string.format('%.0f %d', lowest, need[2]), 'PX', CALLED)
          called[name] = nil
        end
      end
    end
    call('UNLINK', key)
    call('SREM', R .. ':park', name)
  end

  local function park(name, rec, group, turn)
    local member = rec.queue .. ':' .. rec.lane .. (group and ' ' .. group or '')
    call('ZADD', R .. ':park:' .. name, turn or 0, member)
    call('SADD', R .. ':park', name)
  end

  local function runs(holder)
    local id, attempt = string.match(holder, '^(%S+) (%d+)$')
    local f = id and call('HMGET', jkey(id), 's', 'k', 'A')
    return f and f[1] == 'r' and f[2] == attempt, f and f[3]
  end

  -- Takes back the slots of a job that has left its worker. Slots that were lent go back to who lent them. ended: it is
  -- not run again, and its record may say which they were.
  function made.free(id, rec, ended)
    if not rec.slots then
      return
    end
    local own = id .. ' ' .. rec.attempt
    for _, item in ipairs(cmsgpack.unpack(rec.slots)) do
      local name, lenders = item[1], item[3]
      local key = R .. ':lim:s:' .. name
      local back, awaited = nil, nil
      if freed_of and not lenders then
        local into = freed_of[name] or {}
        freed_of[name] = into
        for _, slot in ipairs(item[2]) do
          into[#into + 1] = { slot, own }
        end
      else
        for _, one in ipairs(lenders or {}) do
          local well, other = runs(one)
          if well and not back then
            back, awaited = one, other
          end
        end
        for _, slot in ipairs(item[2]) do
          if call('HGET', key, slot) == own then
            if back then call('HSET', key, slot, back) else call('HDEL', key, slot) end
          end
        end
        if awaited then
          tell(awaited, { watched = true }, false) -- another one that it waits for may use them now
        end
        if back then
          forget(name)
        else
          freed(name)
        end
      end
    end
    if not ended then
      call('HDEL', jkey(id), 'H')
    end
  end

  -- Frees what nobody can hold any more: a broken record, or a job that somebody else has removed.
  function made.mend()
    for _, name in ipairs(call('SMEMBERS', R .. ':lim:used')) do
      local key, mended = R .. ':lim:s:' .. name, false
      local held = call('HGETALL', key)
      for i = 1, #held, 2 do
        if not runs(held[i + 1]) then
          call('HDEL', key, held[i])
          mended = true
        end
      end
      if mended then
        freed(name)
      elseif not held[1] then
        call('SREM', R .. ':lim:used', name)
      end
    end
  end

  -- Puts a waiting job into its group. A group that comes anew waits until the others have had their turn, but not
  -- until the one that has just had it has had another.
  function made.join(id, rec, score)
    local group = rec.group or call('HGET', jkey(id), 'E') or '/'
    local key, lane = group_key(rec, group), rec.queue .. ':' .. rec.lane
    local turn = tonumber(call('HGET', R .. ':fair:n', lane))
    if not turn then
      call('HSET', R .. ':fair:n', lane, 0)
    end
    if call('EXISTS', key) == 0 then
      call('ZADD', ring_of(rec, group), 'NX', (turn or 0) - 0.5, group)
    end
    call('ZADD', key, score, id)
  end

  local function leave_group(id, rec, group)
    local key = group_key(rec, group)
    call('ZREM', key, id)
    return call('EXISTS', key) == 0
  end

  -- A job has left its lane without having been started: what it kept others from is open to them.
  function made.left(id, rec)
    local group = grouped(rec.lane) and (call('HGET', jkey(id), 'E') or '/') or nil
    if group and leave_group(id, rec, group) then
      call('ZREM', ring_of(rec, group), group)
    end
    for _, need in ipairs(made.needs(rec.actor, group)) do
      made.open(need[1])
    end
  end

  -- A job was to be started, and leaves its group: the others come first now. began: false when it could not be, or had
  -- waited too long, which costs its group no turn.
  function made.took(id, rec, group, began)
    local turn = call('HINCRBY', R .. ':fair:n', rec.queue .. ':' .. rec.lane, began and 1 or 0)
    if leave_group(id, rec, group) then
      call('ZREM', ring_of(rec, group), group)
    elseif began then
      call('ZADD', ring_of(rec, group), turn, group)
    end
  end

  -- A lane waits for room: nobody behind it is given the last slots in this call.
  local function wait_for(name, number, lane)
    if number <= made.capacity(name) then
      claimed[name] = math.min(claimed[name] or math.huge, lane.score)
      grabs = grabs + 1 -- what was found before may be for this lane now
    end
    if made.idle then
      park(name, lane)
    end
  end

  local function first_of(ring)
    return call('ZRANGE', ring, 0, 0, 'WITHSCORES')
  end

  -- The group of a lane whose turn it is, and its turn. keyed: it is to be one with a key.
  local function whose_turn(lane, keyed)
    local name = lane.queue .. ':' .. lane.lane
    local ring, without = ring_key(name, false), {}
    if not keyed then
      without = first_of(ring)
      while without[1] and ring_of(lane, without[1]) ~= ring do
        -- Versions that knew of one ring only have put it here.
        call('ZADD', ring_of(lane, without[1]), 'NX', without[2], without[1])
        call('ZREM', ring, without[1])
        without = first_of(ring)
      end
    end
    local with = first_of(ring_key(name, true))
    if without[1] and (not with[1] or tonumber(without[2]) <= tonumber(with[2])) then
      with = without
    end
    return with[1], with[2]
  end

  local function first_by_turns(lane)
    local keyed = false
    while true do
      local group, turn = whose_turn(lane, keyed)
      if not group then
        return nil
      end
      local id = call('ZRANGE', group_key(lane, group), 0, 0)[1]
      if not id then
        call('ZREM', ring_of(lane, group), group)
      else
        local needs = made.needs(lane.actor, group)
        local name, number = made.lacking(needs, lane.score)
        if not name or over(id) then
          return id, needs, group
        end
        if string.find(name, '/', 1, true) then
          -- Only jobs of its key wait for that.
          park(name, lane, group, turn)
          call('ZREM', ring_of(lane, group), group)
        else
          wait_for(name, number, lane)
          if string.sub(name, 1, 1) ~= '@' then
            return nil
          end
          keyed = true -- all without a key wait for that
        end
      end
    end
  end

  -- The job of a lane that is to be started next, what it needs, and its group where it stands in one; nil when none
  -- may start, and the lane is parked. One whose time is over may lack what it needs: `start` ends it.
  -- lane: queue, lane, actor, key of the shelf, letter of the shelf, and who stands first there, if that is known.
  function made.first(lane)
    local found = lane.found
    if not found or found.grabs ~= grabs then
      local id, needs, group = made.look(lane)
      found = { id = id, needs = needs, group = group, grabs = grabs }
    end
    lane.found = nil
    return found.id, found.needs, found.group
  end

  -- Whether there is one. `first` need not look again then, unless slots are given meanwhile.
  function made.has_first(lane)
    local id, needs, group = made.look(lane)
    lane.found = { id = id, needs = needs, group = group, grabs = grabs }
    return id
  end

  function made.look(lane)
    if lane.shelf == 'q' and grouped(lane.lane) then
      return first_by_turns(lane)
    end
    local id = lane.head or call('ZRANGE', lane.key, 0, 0)[1]
    if not id then
      return nil
    end
    local group = grouped(lane.lane) and call('HGET', jkey(id), 'E') or nil
    local needs = made.needs(lane.actor, group)
    local name, number = made.lacking(needs, lane.score)
    if name and not over(id) then
      wait_for(name, number, lane)
      return nil
    end
    return id, needs
  end

  -- Those of the lanes that may be taken from, in the order of their heads.
  function made.startable(lanes)
    table.sort(lanes, function(a, b) return a.score < b.score end)
    local kept = {}
    for _, lane in ipairs(lanes) do
      lane.turns = grouped(lane.lane)
      lane.limited = lane.turns or #made.needs(lane.actor) > 0
      if not lane.limited or made.has_first(lane) then
        kept[#kept + 1] = lane
      end
    end
    return kept
  end

  -- Those who may lend their slots to a job that a job waits for: that one, and what both come from.
  function made.waiting(waiter, target)
    local chain = { waiter }
    for _, from in ipairs({ waiter, target }) do
      for _ = 1, 100 do
        from = call('HGET', jkey(from), 'P')
        if not from then
          break
        end
        chain[#chain + 1] = from
      end
    end
    return chain
  end

  -- Starts those jobs, at most `n`, that somebody waits for who lends them what they lack. lanes: a set of "QUEUE:LANE".
  function made.start_lent(n, lanes, begin)
    local waited_for = call('HGETALL', R .. ':lim:lent')
    for i = 1, #waited_for, 2 do
      local id, waiter = waited_for[i], waited_for[i + 1]
      local f = call('HMGET', jkey(id), 's', 'q', 'a', 'l', 'E', 'i')
      local lane = f[4] or f[3]
      if f[1] ~= 'q' then
        call('HDEL', R .. ':lim:lent', id)
      elseif n > 0 and not f[6] and lanes[f[2] .. ':' .. lane] then
        local group = grouped(lane) and (f[5] or '/') or nil
        local needs = made.needs(f[3], group)
        local lent = made.borrow(needs, made.waiting(waiter, id))
        if lent and next(lent) then
          local began = begin(id, needs, lent)
          n = n - (began and 1 or 0)
          call('ZREM', R .. ':s:q:' .. f[2] .. ':' .. lane, id)
          call('HDEL', R .. ':lim:lent', id)
          if group then
            made.took(id, { queue = f[2], lane = lane }, group, began)
          end
        end
      end
    end
  end

  -- What waiting jobs lend to one that they, or those who wait for them, wait for: by name the slots that it lacks; nil
  -- when that is not all of them. And whether some of them hold what it lacks, and may lend it later. chain: ids.
  function made.borrow(needs, chain)
    local lent, later = {}, false
    for _, need in ipairs(needs) do
      local name = need[1]
      if lent and used(name) + need[2] > made.capacity(name) then
        local found = nil
        for _, id in ipairs(chain) do
          local f = call('HMGET', jkey(id), 's', 'k', 'A', 'H')
          local own, slots, lenders = id .. ' ' .. (f[2] or ''), {}, {}
          for _, item in ipairs(f[1] == 'r' and f[4] and cmsgpack.unpack(f[4]) or {}) do
            if item[1] == name then
              later, lenders = true, item[3] or {}
              for _, slot in ipairs(item[2]) do
                if f[3] and #slots < need[2] and call('HGET', R .. ':lim:s:' .. name, slot) == own then
                  slots[#slots + 1] = slot
                end
              end
            end
          end
          found = found or #slots == need[2] and { slots, { own, unpack(lenders) } } or nil
        end
        if found then lent[name] = found else lent = nil end
      end
    end
    return lent, later
  end

  return made
end
