-- Jobs of which there is to be one: each key of an actor's jobs leads to the job that came with it last. Whether that one
-- still counts is seen from its record, so nothing is to be given back when it ends.

local function unique_key(actor, key)
  return R .. ':uk:' .. actor .. ':' .. key
end

-- The job, and its record, that a new one may not stand beside; nil when there is none. holds: q as long as it waits, a
-- until it has ended, or for how many ms from its creation unless it has ended without success.
local function occupant(item)
  local holds = item[18][2]
  local id = call('GET', unique_key(item[3], item[18][1]))
  local rec = id and id ~= item[1] and load(id)
  if not rec then
    return nil
  end
  local counts
  if holds == 'q' then
    counts = rec.state == 'q' or rec.state == 'w'
  elseif holds == 'a' then
    counts = not ENDED[rec.state]
  else
    counts = rec.state ~= 'd' and rec.state ~= 'c' and tonumber(call('HGET', jkey(id), 't')) + holds > NOW
  end
  if counts then
    return id, rec
  end
end

-- Has the key lead to a new job; returns the id of another one where that is to stay the only one, else nil.
claim_unique = function(item)
  local policy = item[18][3]
  local id, rec = occupant(item)
  if id then
    if policy ~= 'replace' then
      return (policy == 'reject' and '!' or '=') .. id
    end
    cancel(id, rec)
  end
  call('SET', unique_key(item[3], item[18][1]), item[1])
end

-- The first job that stands in the way of one of several that are to be rejected then, as `claim_unique` answers; nil when
-- there is none. So nothing is created where not all can be.
local function rejected(items)
  local seen = {}
  for _, item in ipairs(items) do
    if item[18] and item[18][3] == 'reject' and call('EXISTS', jkey(item[1])) == 0 then
      local key = unique_key(item[3], item[18][1])
      local id = occupant(item) or seen[key]
      if id then
        return '!' .. id
      end
      seen[key] = item[1]
    end
  end
end
