#!lua
-- parts: events counts queue limits moves create hooks ends cancel unique
-- As enqueue.lua, for jobs some of which are to be the only ones. ARGV: packed jobs as there. Returns for each 1 (created),
-- 0 (the id existed), "=" and the id of the job that stays the only one, or the error's text; just "!" and an id when
-- nothing was created, because a job is to be rejected where that one is.
local items = {}
for i = 1, #ARGV do
  local last = items[#items]
  if last and last[8] == false then
    last[8] = ARGV[i]
  else
    items[#items + 1] = cmsgpack.unpack(ARGV[i])
  end
end
local answer = rejected(items)
if answer then
  return answer
end
answer = {}
for i, item in ipairs(items) do
  local well, made = pcall(create, item)
  if not well then
    made = 'error ' .. tostring(type(made) == 'table' and made.err or made)
  end
  answer[i] = made
end
write_ends()
write_counts()
return answer
