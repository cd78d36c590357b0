-- Telling elsewhere how jobs go: by their callbacks and their webhooks.

-- MessagePack of no arguments, [[], {}]: what a callback is about says its parent.
local NO_ARGUMENTS = string.char(0x92, 0x90, 0x80)

-- Has delivered what was asked for of a job at an event: s, d or c (it ends so), r (it is started), p (it has told of its
-- progress). Made again it exists already and nothing happens.
local function call_back(id, rec, event)
  local key = R .. ':cb:' .. id
  local ends = event ~= 'r' and event ~= 'p'
  if ends and string.find(rec.callback, '1', 1, true) then
    call('HSET', key, 's', 'p')
    create({ id .. '.cb' .. rec.number, CALLBACKS, CALLBACK, CALLBACK, 0, -1, -1, NO_ARGUMENTS, 0, id })
  end
  if not string.find(rec.callback, event, 1, true) then
    return
  end
  local delivery, due = id .. '.wh' .. (ends and rec.number or event .. rec.attempt), -1
  if event == 'p' then
    local f = call('HMGET', key, 'm', 'n')
    local last = tonumber(f[2])
    if last and last > NOW then
      return -- one waits for its time, and will tell the progress of then
    end
    due = last and math.max(NOW, last + tonumber(f[1])) or NOW
    call('HSET', key, 'n', due)
    delivery = delivery .. '.' .. string.format('%.0f', due)
  end
  call('HSET', key, 'h', 'p', 'i', delivery)
  local arguments = cmsgpack.pack({ event, due < 0 and NOW or due, rec.attempt })
  create({ delivery, CALLBACKS, CALLBACK, CALLBACK, 0, -1, due, string.char(0x92) .. arguments .. string.char(0x80), 0, id })
end
