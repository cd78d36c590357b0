#!lua flags=no-writes
-- The posted functions without their code, in the order of their posting: of each name, serial, when it was signed, when it
-- was posted (ms), bytes, why a worker could not load it (MessagePack, '' when none has said so).
local found = {}
local all = call('HGETALL', R .. ':pf')
for i = 1, #all, 2 do
  local well, item = pcall(cmsgpack.unpack, all[i + 1])
  if well and type(item) == 'table' and #item >= 6 then
    found[#found + 1] = { tonumber(item[1]) or 0, all[i], string.format('%.0f', item[2]), string.format('%.0f', item[3]),
      string.format('%.0f', item[4]), #item[5], call('HGET', R .. ':pfe', all[i]) or '' }
  end
end
table.sort(found, function(a, b) return a[1] < b[1] end)
for _, item in ipairs(found) do
  table.remove(item, 1)
end
return found
