local function write_progress(id, rec, value, note)
  if value then
    call('HSET', jkey(id), 'v', value, 'V', note or '')
    emit('progress', id)
    tell(id, rec, false)
  end
end
