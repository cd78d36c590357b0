#!lua
-- parts: events queue limits create
-- ARGV: one packed job each, a large body (false in it) behind it. Returns for each job 1 (created), 0 (the id existed) or
-- the error's text.
local answer, i, last = {}, 0, #ARGV
while i < last do
  i = i + 1
  local well, made = pcall(function()
    local item = cmsgpack.unpack(ARGV[i])
    if item[8] == false then
      i = i + 1
      item[8] = ARGV[i]
    end
    return create(item)
  end)
  if not well then
    made = 'error ' .. tostring(type(made) == 'table' and made.err or made)
  end
  answer[#answer + 1] = made
end
return answer
