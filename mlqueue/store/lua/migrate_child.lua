#!lua
-- parts: events counts queue limits moves create hooks ends cancel unique history progress settle
-- Children of groups that were completed in another store. ARGV: one packed pair each: id, and the group as a settle has
-- it.
for i = 1, #ARGV do
  local item = cmsgpack.unpack(ARGV[i])
  complete_child(item[1], item[2])
end
return 1
