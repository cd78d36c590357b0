#!lua
-- parts: events queue
-- What running jobs show of themselves: lines of their logs, metrics, what they use. Sent again it changes nothing.
-- ARGV: most bytes of a job's log, then packed for each job: id, attempt, number of the first line in this attempt,
-- lines, metrics (flat: name, head, how many bytes of its points stay, the points behind those), usage (false: none).
-- Returns for each 1 (written), 0 (stale), 2 (written, and cancelling has been asked for) or an error's text.
local most = tonumber(ARGV[1])

-- Adds what is new of the record to `fields`. As many lines as went with a full buffer of the worker would have gone
-- here: its buffer is as large as the log.
local function add_lines(id, attempt, o, first, lines, fields)
  local key = R .. ':lg:' .. id
  local dropped, bytes, was, written = 0, 0, 0, 0
  if o then
    dropped, bytes, was, written = unpack(cmsgpack.unpack(o))
  end
  if was ~= attempt then
    written = 0
  end
  if first > written then
    dropped, bytes = dropped + call('LLEN', key) + first - written, 0
    call('UNLINK', key)
    written = first
  end
  local known = written - first
  for i = known + 1, #lines, 1000 do
    call('RPUSH', key, unpack(lines, i, math.min(i + 999, #lines)))
  end
  for i = known + 1, #lines do
    bytes = bytes + #lines[i]
  end
  while bytes > most do
    bytes = bytes - #call('LPOP', key)
    dropped = dropped + 1
  end
  fields[1], fields[2] = 'o', cmsgpack.pack({ dropped, bytes, attempt, math.max(written, first + #lines) })
end

local HEAD = 12

local function add_metrics(id, attempt, metrics, fields)
  local key, values = R .. ':me:' .. id, {}
  for i = 1, #metrics, 4 do
    local stays, before = metrics[i + 2], ''
    if stays > 0 then
      before = call('HGET', key, metrics[i]) or ''
      if #before < HEAD + stays then
        error('points of a metric are gone')
      end
      before = string.sub(before, HEAD + 1, HEAD + stays)
    end
    values[#values + 1] = metrics[i]
    values[#values + 1] = metrics[i + 1] .. before .. metrics[i + 3]
  end
  call('HSET', key, unpack(values))
  fields[#fields + 1] = 'm'
  fields[#fields + 1] = attempt
end

local function show(item)
  local id, attempt, fields = item[1], item[2], {}
  local f = call('HMGET', jkey(id), 's', 'k', 'c', 'W', 'o')
  if f[1] ~= 'r' or tonumber(f[2]) ~= attempt then
    return 0
  end
  if #item[4] > 0 then
    add_lines(id, attempt, f[5], item[3], item[4], fields)
  end
  if #item[5] > 0 then
    add_metrics(id, attempt, item[5], fields)
  end
  if item[6] then
    fields[#fields + 1] = 'e'
    fields[#fields + 1] = item[6]
  end
  call('HSET', jkey(id), unpack(fields))
  if #item[4] > 0 then
    emit('logs', id)
  end
  if #item[5] > 0 then
    emit('metrics', id)
  end
  if f[4] and #item[4] + #item[5] > 0 then
    tell(id, { watched = f[4] }, false)
  end
  return f[3] and 2 or 1
end

local answer = {}
for i = 2, #ARGV do
  local well, outcome = pcall(show, cmsgpack.unpack(ARGV[i]))
  answer[#answer + 1] = well and outcome or tostring(type(outcome) == 'table' and outcome.err or outcome)
end
return answer
