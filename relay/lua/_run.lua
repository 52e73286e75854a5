-- A run's hash: applying events to it, and what every way of ending a run has in common.

local function is_ended(status)
  return status == 'completed' or status == 'error' or status == 'cancelled'
end

-- What applying events needs to know of the run so far.
local function load_progress()
  local run = redis.call('HMGET', RUN, 'status', 'seq', 'attempt', 'lane', 'texts', 'open_tools',
    'open_inputs')
  return {status = run[1], seq = tonumber(run[2]), attempt = run[3], lane = run[4],
    texts = run[5] or '', open_tools = run[6] or '{}', open_inputs = run[7] or '{}'}
end

local function append_text(progress, run_id, offset, message_id, text, bytes_before)
  local name = run_id .. ':' .. progress.attempt .. ':' .. message_id
  local key = BASE .. 'text:' .. name
  local length = redis.call('APPEND', key, text)
  if length ~= bytes_before + #text then
    -- A piece before this one is gone (key lost, history rewound). A text with a silent hole is
    -- worse than none: readers see the hole by position and get the result.
    redis.call('UNLINK', key)
    redis.call('ZREM', TEXTS, name)
    return
  end
  redis.call('ZADD', TEXTS, int(offset), name)
  if length == #text then
    redis.call('PEXPIRE', key, RUN_TTL_ACTIVE_MS)
    redis.call('PEXPIRE', TEXTS, RUN_TTL_ACTIVE_MS)
    progress.texts = progress.texts .. ' ' .. name
  end
end

-- Appends events and keeps the run's hash in step. ARGV has six per event, `from` … `to`:
-- kind, op, id, value, event bytes, extra. Op of lifecycle events: '' start tool+ tool- input+
-- input- retry end. Id and value: tool call id and name, request id and its JSON; the delay in ms
-- for retry, the status for end, both in value; extra: digest of the bytes. Of texts: id message,
-- value text, extra the bytes before it.
local function apply_events(channel, batch, run_id, progress, from, to)
  local tools, inputs, last_event = nil, nil, nil
  local fields = {}
  local function set(name, value)
    fields[#fields + 1] = name
    fields[#fields + 1] = value
  end
  for index = from, to, 6 do
    local kind, op, id, value = tonumber(ARGV[index]), ARGV[index + 1], ARGV[index + 2], ARGV[index + 3]
    local event, extra = ARGV[index + 4], ARGV[index + 5]
    if kind ~= KIND_EVENT then
      local offset = append(channel, batch, kind, 0, run_id, event, '', false)
      if kind == KIND_TEXT then
        append_text(progress, run_id, offset, id, value, tonumber(extra))
      end
    else
      if op == 'input-' then
        inputs = inputs or cjson.decode(progress.open_inputs)
      end
      -- An answer may have closed the request before its worker could know: the first one counts.
      if op ~= 'input-' or inputs[id] then
        progress.seq = progress.seq + 1
        last_event = event
        local offset = append(channel, batch, kind, progress.seq, run_id, event, extra, op == 'end')
        if op == 'start' then
          progress.status = 'running'
          set('started_ms', int(NOW))
        elseif op == 'tool+' or op == 'tool-' then
          tools = tools or cjson.decode(progress.open_tools)
          tools[id] = op == 'tool+' and value or nil
        elseif op == 'input+' or op == 'input-' then
          inputs = inputs or cjson.decode(progress.open_inputs)
          inputs[id] = op == 'input+' and value or nil
          progress.status = next(inputs) and 'waiting' or 'running'
        elseif op == 'retry' then
          progress.status = 'retrying'
          set('retry_at_ms', int(NOW + tonumber(value)))
        elseif op == 'end' then
          progress.status, progress.ended_at, progress.ended_with = value, offset, event
          channel.held = 0
        end
      end
    end
  end
  set('seq', int(progress.seq))
  set('status', progress.status)
  set('last_offset', int(channel.offset))
  set('updated_ms', int(NOW))
  set('texts', progress.texts)
  if tools then
    set('open_tools', cjson.encode(tools))
  end
  if inputs then
    set('open_inputs', cjson.encode(inputs))
  end
  if last_event then
    set('last_event', string.match(last_event, '^{"type":"([a-z_]+)"') or '')
  end
  redis.call('HSET', RUN, unpack(fields))
  return progress
end

-- Gives a lane's runs, separated by spaces, or nil where there are none. A first run whose hash is
-- gone would never leave, and those behind it would wait for ever: it is taken out.
local function runs_in_lane(lane)
  local stored = redis.call('HGET', THREADS, lane)
  local runs = stored
  while runs and redis.call('EXISTS', BASE .. 'run:' .. string.match(runs, '%S+')) == 0 do
    runs = string.match(runs, '^%S+ (.+)$')
  end
  if stored and not runs then
    redis.call('HDEL', THREADS, lane)
  elseif runs ~= stored then
    redis.call('HSET', THREADS, lane, runs)
  end
  return runs or nil
end

-- How many lanes have runs. Lanes of lost runs are looked for only where they would matter.
local function count_lanes(limit)
  if redis.call('HLEN', THREADS) >= limit then
    for _, lane in ipairs(redis.call('HKEYS', THREADS)) do
      runs_in_lane(lane)
    end
  end
  return redis.call('HLEN', THREADS)
end

-- Takes the run out of its lane. Gives the run that is next there and its agent, or ''.
local function leave_lane(lane, run_id)
  local waiting = redis.call('HGET', THREADS, lane)
  if not waiting then
    return '', ''
  end
  local rest = {}
  local was_first = string.match(waiting, '%S+') == run_id
  for name in string.gmatch(waiting, '%S+') do
    if name ~= run_id then
      rest[#rest + 1] = name
    end
  end
  if #rest == 0 then
    redis.call('HDEL', THREADS, lane)
    return '', ''
  end
  redis.call('HSET', THREADS, lane, table.concat(rest, ' '))
  local left = was_first and runs_in_lane(lane)
  if not left then
    return '', ''
  end
  local following = string.match(left, '%S+')
  return following, redis.call('HGET', BASE .. 'run:' .. following, 'agent') or ''
end

-- Closes the run's books after its terminal event; gives the next run of its lane, and its agent.
local function end_run(run_id, progress)
  local fields = {'ended_ms', int(NOW), 'result_offset', int(progress.ended_at),
    'open_tools', '{}', 'open_inputs', '{}'}
  if #progress.ended_with <= BODY_THRESHOLD_BYTES then
    fields[#fields + 1] = 'terminal'
    fields[#fields + 1] = progress.ended_with
  end
  redis.call('HSET', RUN, unpack(fields))
  redis.call('PEXPIRE', RUN, RUN_TTL_AFTER_END_MS)
  local text_ttl = MAX_AGE_MS + CHANNEL_TTL_MARGIN_MS
  if progress.status == 'completed' then
    text_ttl = TEXT_TTL_AFTER_RUN_MS
  end
  for name in string.gmatch(progress.texts, '%S+') do
    redis.call('PEXPIRE', BASE .. 'text:' .. name, text_ttl)
  end
  return leave_lane(progress.lane, run_id)
end
