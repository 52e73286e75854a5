-- A run's hash, and what every way of ending a run has in common.

-- Takes the run out of its lane. Gives the run that is next there and its agent, or ''.
local function leave_lane(lane, run_id)
  local waiting = redis.call('HGET', THREADS, lane)
  if not waiting then
    return '', ''
  end
  local rest = {}
  local was_first = false
  local index = 0
  for name in string.gmatch(waiting, '%S+') do
    index = index + 1
    if name ~= run_id then
      rest[#rest + 1] = name
    elseif index == 1 then
      was_first = true
    end
  end
  if #rest == 0 then
    redis.call('HDEL', THREADS, lane)
    return '', ''
  end
  redis.call('HSET', THREADS, lane, table.concat(rest, ' '))
  if not was_first then
    return '', ''
  end
  return rest[1], redis.call('HGET', BASE .. 'run:' .. rest[1], 'agent') or ''
end

-- Closes the run's books after its terminal event was appended at `offset`.
local function end_run(run_id, lane, texts, status, offset, event)
  local fields = {'status', status, 'ended_ms', int(NOW), 'result_offset', int(offset),
    'open_tools', '{}', 'open_inputs', '{}'}
  if #event <= BODY_THRESHOLD then
    fields[#fields + 1] = 'terminal'
    fields[#fields + 1] = event
  end
  redis.call('HSET', RUN, unpack(fields))
  redis.call('PEXPIRE', RUN, RUN_AFTER_END_MS)
  local text_ttl = MAX_AGE_MS + LOG_MARGIN_MS
  if status == 'completed' then
    text_ttl = TEXT_AFTER_RUN_MS
  end
  for name in string.gmatch(texts or '', '%S+') do
    redis.call('PEXPIRE', BASE .. 'text:' .. name, text_ttl)
  end
  return leave_lane(lane, run_id)
end
