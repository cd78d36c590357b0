#!lua
-- parts: events queue limits create
-- ARGV: one packed job each. Returns for each 1 (created), 0 (the id existed) or the error's text.
local answer = {}
for i = 1, #ARGV do
  local well, made = pcall(function() return create(cmsgpack.unpack(ARGV[i])) end)
  if not well then
    made = 'error ' .. tostring(type(made) == 'table' and made.err or made)
  end
  answer[i] = made
end
return answer
