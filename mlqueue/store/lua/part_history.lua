-- One line of the job's history: an attempt that did not succeed. stage: how a limit ended it, if one did: interrupted or
-- killed.
local function note_attempt(id, rec, how, err, stage)
  local key = R .. ':at:' .. id
  local f = call('HMGET', jkey(id), 'u', 'e', 'R')
  -- What it began from stands last, where there is any: versions that know of none do not read such a line.
  call('RPUSH', key, cmsgpack.pack({ rec.attempt, rec.worker or '', tonumber(f[1] or 0), NOW, how, err or '', stage or '',
    f[2] or '', f[3] or nil }))
  if call('LLEN', key) > 50 then
    call('LPOP', key)
  end
end
