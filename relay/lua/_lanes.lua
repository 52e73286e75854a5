-- The order of a user's runs: each lane is a thread, or one run that runs in parallel.

-- Gives a lane's runs, separated by spaces, or nil where there are none. A first run whose hash is
-- gone would never leave, and those behind it would wait for ever: it is taken out.
local function runs_in_lane(lane)
  local stored = call('HGET', THREADS, lane)
  local runs = stored
  while runs and call('EXISTS', BASE .. 'run:' .. string.match(runs, '%S+')) == 0 do
    runs = string.match(runs, '^%S+ (.+)$')
  end
  if stored and not runs then
    call('HDEL', THREADS, lane)
  elseif runs ~= stored then
    call('HSET', THREADS, lane, runs)
  end
  return runs or nil
end

-- How many lanes have runs. Lanes of lost runs are looked for only where they would matter.
local function count_lanes(limit)
  if call('HLEN', THREADS) >= limit then
    for _, lane in ipairs(call('HKEYS', THREADS)) do
      runs_in_lane(lane)
    end
  end
  return call('HLEN', THREADS)
end

-- Closes the run's books after its terminal event; gives the next run of its lane, and its agent.
local function end_run(run_id, progress)
  -- Takes the run out of its lane. Gives the run that is next there and its agent, or ''.
  local function leave_lane(lane)
    local waiting = call('HGET', THREADS, lane)
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
      call('HDEL', THREADS, lane)
      return '', ''
    end
    call('HSET', THREADS, lane, table.concat(rest, ' '))
    local left = was_first and runs_in_lane(lane)
    if not left then
      return '', ''
    end
    local following = string.match(left, '%S+')
    return following, call('HGET', BASE .. 'run:' .. following, 'agent') or ''
  end

  local run = call('HMGET', RUN, 'lane', 'texts')
  local next_run, next_agent = leave_lane(run[1])
  local fields = {'ended_ms', NOW, 'result_offset', progress.ended_at, 'open_tools', '{}',
    'open_inputs', '{}', 'next_run', next_run, 'next_agent', next_agent}
  if progress.ended_with and #progress.ended_with <= BODY_THRESHOLD_BYTES then
    fields[#fields + 1] = 'terminal'
    fields[#fields + 1] = progress.ended_with
  end
  call('HSET', RUN, unpack(fields))
  local run_ttl, text_ttl = RUN_TTL_AFTER_END_MS, TEXT_TTL_AFTER_RUN_MS
  if progress.status ~= 'completed' then
    -- Its texts are in no result: they stay as long as the log, and are read with the run's hash.
    text_ttl = MAX_AGE_MS + CHANNEL_TTL_MARGIN_MS
    run_ttl = math.max(run_ttl, text_ttl)
  end
  call('PEXPIRE', RUN, run_ttl)
  for name in string.gmatch(run[2] or '', '%S+') do
    call('PEXPIRE', BASE .. 'text:' .. name, text_ttl)
  end
  return next_run, next_agent
end
