-- A run's hash: applying events to it.

local function is_ended(status)
  return status == 'completed' or status == 'error' or status == 'cancelled'
end

-- What applying events needs to know of the run so far; what only some of them need is read then.
local function load_progress()
  local run = call('HMGET', RUN, 'status', 'seq', 'attempt')
  return {status = run[1], seq = tonumber(run[2]), attempt = run[3]}
end

local function append_text(progress, run_id, offset, message_id, text, bytes_before)
  local name = run_id .. ':' .. progress.attempt .. ':' .. message_id
  local key = BASE .. 'text:' .. name
  local length = call('APPEND', key, text)
  if length ~= bytes_before + #text then
    -- A piece before this one is gone (key lost, history rewound). A text with a silent hole is
    -- worse than none: readers see the hole by position and get the result.
    call('UNLINK', key)
    call('ZREM', TEXTS, name)
    return
  end
  call('ZADD', TEXTS, offset, name)
  if length == #text then
    call('PEXPIRE', key, RUN_TTL_ACTIVE_MS)
    call('PEXPIRE', TEXTS, math.max(RUN_TTL_ACTIVE_MS, MAX_AGE_MS + CHANNEL_TTL_MARGIN_MS))
    call('HSET', RUN, 'texts', (call('HGET', RUN, 'texts') or '') .. ' ' .. name)
  end
end

-- Appends events; `save_run` then brings the run's hash up to date. ARGV has six per event, `from`
-- … `to`: kind, type, id, value, event bytes, extra.
--   lifecycle events (kind 0): id and value are the call's and the tool's of tool_executing and
--     tool_completed, the request's and its JSON of input_requested and input_resolved; value is
--     the delay in ms of agent_retrying, and the status that a terminal event leads to; extra:
--     digest of the bytes
--   texts (1): id message, value text, extra the bytes before it
--   progress (2)
--   staged events (3): as kind 0, but the bytes lie in a key of their own (`staged` gives its name
--     for the index of the event), and their size stands in their place
local function apply_events(channel, batch, run_id, progress, from, to, staged)
  local changes, tools, inputs = {}, nil, nil
  progress.changes = changes
  local function decoded(field)
    return cjson.decode(call('HGET', RUN, field) or '{}')
  end
  local old_status = progress.status
  for index = from, to, 6 do
    local kind, name, id, value = ARGV[index], ARGV[index + 1], ARGV[index + 2], ARGV[index + 3]
    local event, extra = ARGV[index + 4], ARGV[index + 5]
    if kind == '1' then
      append(channel, batch, KIND_TEXT, 0, run_id, event)
      append_text(progress, run_id, channel.offset_text, id, value, tonumber(extra))
    elseif kind == '2' then
      append(channel, batch, 2, 0, run_id, event)
    else
      if name == 'input_resolved' then
        inputs = inputs or decoded('open_inputs')
      end
      -- An answer may have closed the request before its worker could know: the first one counts.
      if name ~= 'input_resolved' or inputs[id] then
        local is_terminal = name == 'agent_completed' or name == 'agent_error'
          or name == 'agent_cancelled'
        local key = kind == '3' and staged((index - from) / 6) or nil
        progress.seq = progress.seq + 1
        progress.last_event = name
        local offset = append(channel, batch, KIND_EVENT, progress.seq, run_id, event, extra,
          is_terminal, key)
        if name == 'agent_started' then
          progress.status = 'running'
          changes.started_ms = NOW
        elseif name == 'tool_executing' or name == 'tool_completed' then
          tools = tools or decoded('open_tools')
          tools[id] = name == 'tool_executing' and value or nil
        elseif name == 'input_requested' or name == 'input_resolved' then
          inputs = inputs or decoded('open_inputs')
          inputs[id] = name == 'input_requested' and value or nil
          progress.status = next(inputs) and 'waiting' or 'running'
        elseif name == 'agent_retrying' then
          progress.status = 'retrying'
          changes.retry_at_ms = NOW + tonumber(value)
        elseif is_terminal then
          progress.status, progress.ended_at = value, offset
          progress.ended_with = not key and event or nil
          channel.held = 0
          channel.has_new_bounds = true
        end
      end
    end
  end
  if tools then
    changes.open_tools = cjson.encode(tools)
  end
  if inputs then
    changes.open_inputs = cjson.encode(inputs)
  end
  if progress.status ~= old_status then
    changes.status = progress.status
  end
  progress.seq_text = format('%d', progress.seq)
  return progress
end

-- Writes what the events have changed, and `...`: further names and values.
local function save_run(progress, ...)
  local changes = progress.changes
  if progress.last_event and not next(changes) then
    call('HSET', RUN, 'seq', progress.seq_text, 'updated_ms', NOW_TEXT,
      'last_event', progress.last_event, ...)
    return
  end
  local fields = {'seq', progress.seq_text, 'updated_ms', NOW_TEXT, ...}
  changes.last_event = progress.last_event
  for name, value in pairs(changes) do
    fields[#fields + 1] = name
    fields[#fields + 1] = value
  end
  call('HSET', RUN, unpack(fields))
end
