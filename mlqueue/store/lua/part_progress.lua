local function write_progress(id, rec, value, note)
  if value then
    call('HSET', jkey(id), 'v', value, 'V', note or '')
    emit('progress', id)
    tell(id, rec, false)
    if rec.callback and string.find(rec.callback, 'p', 1, true) then
      pcall(call_back, id, rec, 'p') -- whatever is wrong with it, the job goes on
    end
  end
end
