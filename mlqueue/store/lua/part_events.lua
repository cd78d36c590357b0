-- Telling who listens to every job (mlqueue.events), and nothing at all when nobody does.

-- How many events are kept, about; those who were away read on from the one that they heard last.
local KEPT = 20000

local heard = nil

-- kind: state, progress, callback, removed, logs or metrics (there are more). How the job stands is read from its record, so that is written first.
-- Whatever is wrong with the stream, the job goes on.
local function emit(kind, id)
  if heard == nil then
    heard = call('EXISTS', R .. ':evl') == 1
  end
  if not heard then
    return
  end
  local f = call('HMGET', jkey(id), 's', 'q', 'a', 'k', 'v', 'V', 'g', 'c')
  if not f[1] or f[2] == 'mlqueue.callbacks' then
    return
  end
  -- Longer texts are cut, between two characters: the record has them whole.
  local function brief(text)
    local n = 250
    if #text <= n then
      return text
    end
    while n > 0 and string.byte(text, n + 1) >= 128 and string.byte(text, n + 1) < 192 do
      n = n - 1
    end
    return string.sub(text, 1, n)
  end
  local value, note = f[5], f[6] and brief(f[6]) or ''
  if value and #value > 250 then
    value = cmsgpack.pack(brief(cmsgpack.unpack(value))) -- a text; numbers are left alone, they would lose digits
  end
  local callback = kind == 'callback' and (call('HGET', R .. ':cb:' .. id, 's') or call('HGET', R .. ':cb:' .. id, 'h')) or ''
  redis.pcall('XADD', R .. ':ev', 'MAXLEN', '~', KEPT, '*', 'e', cmsgpack.pack({ kind, id, f[1], f[2], f[3],
    tonumber(f[4] or 0), value, note, f[7] or '', f[8] and true or false, callback }))
end
