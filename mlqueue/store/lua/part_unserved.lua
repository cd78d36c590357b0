-- Burying jobs whose functions no worker of their queue has, while some are alive, for longer than they may wait.

local function has_all(known, functions)
  for _, name in ipairs(functions) do
    if not known[name] then
      return false
    end
  end
  return true
end

-- The live workers by queue: for each the set of its functions.
local function crews()
  local by_queue = {}
  for _, worker in ipairs(call('ZRANGEBYSCORE', R .. ':workers', '(' .. NOW, '+inf')) do
    local packed = call('HGET', R .. ':w:' .. worker, 'info')
    local well, info = pcall(cmsgpack.unpack, packed or '')
    if packed and well then
      local known = {}
      for _, name in ipairs(info['functions'] or {}) do
        known[name] = true
      end
      for _, queue in ipairs(info['function_queues'] or {}) do
        by_queue[queue] = by_queue[queue] or {}
        table.insert(by_queue[queue], known)
      end
    end
  end
  return by_queue
end

local function bury(id, functions, patience)
  local rec = load(id)
  if not rec or rec.state ~= 'q' then
    return
  end
  local err = cmsgpack.pack({ '', 'no worker has had the functions ' .. functions .. ' for ' .. patience / 1000 .. ' s', '' })
  unshelve('q', rec, id)
  call('ZREM', R .. ':qt', id)
  call('SET', R .. ':e:' .. id, err)
  finish(id, rec, 'd', { 'g', 'unknown_function' }, -1)
  return true
end

-- Names as people wrote them.
local function unquoted(text)
  return (string.gsub(text, '%%(%x%x)', function(hex) return string.char(tonumber(hex, 16)) end))
end

local function bury_unserved(outcomes, patience)
  local lanes = call('SMEMBERS', R .. ':fl')
  if #lanes == 0 then
    return
  end
  local by_queue = crews()
  for _, name in ipairs(lanes) do
    local queue, list = string.match(name, '^([^:]*):[^|]*|(.-)@?$')
    local shelf, alone, served, alive = R .. ':s:q:' .. name, R .. ':s:i:' .. name, false, false
    local functions = {}
    for one in string.gmatch(list, '[^,]+') do
      functions[#functions + 1] = one
    end
    for _, known in ipairs(by_queue[queue] or {}) do
      alive = true
      served = served or has_all(known, functions)
    end
    served = served or not functions[1] -- it has no list of functions: its jobs take turns
    if call('EXISTS', shelf, alone) == 0 then
      call('SREM', R .. ':fl', name)
      call('HDEL', R .. ':unserved', name)
    elseif served or not alive then
      call('HDEL', R .. ':unserved', name)
    else
      local since = tonumber(call('HGET', R .. ':unserved', name) or NOW)
      call('HSETNX', R .. ':unserved', name, NOW)
      if NOW - since >= patience then
        -- Not those that came later: each waits its time. Lowest numbers first, within a priority.
        for _, id in ipairs(call('ZRANGE', shelf, 0, 499)) do
          local f = call('HMGET', jkey(id), 'N', 't', 'd')
          if NOW - math.max(tonumber(f[1] or f[2] or 0), tonumber(f[3] or 0)) >= patience then
            local well, done = pcall(bury, id, unquoted(table.concat(functions, ', ')), patience)
            if well and done then
              outcomes[#outcomes + 1] = id
              outcomes[#outcomes + 1] = 'dead'
            end
          end
        end
      end
    end
  end
end
