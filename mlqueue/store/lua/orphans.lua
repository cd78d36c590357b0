#!lua flags=allow-oom
-- parts: events queue moves
-- Which keys belong to nothing. ARGV: 1 to remove them, then keys of this namespace. Returns those of them that stand
-- beside a record which is not there, or are chunks that no record names and that have no time to live.
local answer = {}

local function names_chunk(id, what)
  local kind, rest = string.sub(what, 1, 1), string.sub(what, 2)
  if call('EXISTS', jkey(id)) == 0 then return false end
  if kind == 'r' then return call('HGET', R .. ':r:' .. id, 'k') == rest end
  if kind == 'c' then return call('HGET', R .. ':ck:' .. id, 'g') == rest end
  local body = call('HGET', jkey(id), 'b')
  return body and string.sub(body, 1, 4) == '\193MQa' and cmsgpack.unpack(string.sub(body, 5))[1] == rest
end

local function is_orphan(key)
  local name = string.sub(key, #R + 2)
  local kind, rest = string.match(name, '^(%l+):(.+)$')
  if kind == 'x' then
    local id, what = string.match(rest, '^(.*):(%l[^:]*):%d+$')
    if not id or call('EXISTS', R .. ':mig:j:' .. id) == 1 or call('PTTL', key) ~= -1 then
      return false
    end
    -- Results of an attempt that has not settled yet have a time to live.
    local well, named = pcall(names_chunk, id, what)
    return well and not named
  elseif kind == 'b' or kind == 'r' or kind == 'e' or kind == 'at' or kind == 'ck' or kind == 'wt' or kind == 'cb'
    or kind == 'ca' or kind == 'lg' or kind == 'me' then
    return call('EXISTS', jkey(rest)) == 0
  elseif kind == 'h' then
    return not call('ZSCORE', R .. ':workers', rest)
  end
  return false
end

for i = 2, #ARGV do
  if call('EXISTS', ARGV[i]) == 1 and is_orphan(ARGV[i]) then
    answer[#answer + 1] = ARGV[i]
    if ARGV[1] == '1' then
      call('UNLINK', ARGV[i])
    end
  end
end
return answer
