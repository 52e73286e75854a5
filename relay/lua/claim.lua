-- Give a run to a worker, by compare-and-set: a duplicate task is harmless.
--
-- ARGV  6 run id  7 fence (random)  8 worker id  9 lease in ms
--       10 most attempts  11 ms without progress after which the run counts as stalled
--
-- Gives {'claimed', attempt, seq, agent, thread, request, cancel flag, created_ms, epoch}
--         (the same fence again gives the same answer)
--       {'taken', worker} | {'waiting'} not its thread's turn | {'ended', status} | {'unknown'}

local run_id, fence, worker = ARGV[6], ARGV[7], ARGV[8]

local channel = open_channel()
local run = call('HMGET', RUN, 'status', 'fence', 'attempt', 'seq', 'agent', 'thread',
  'request', 'cancel', 'created_ms', 'lane', 'worker', 'retry_at_ms')
local status = run[1]
if not status then
  return {'unknown'}
end
local attempt = tonumber(run[3])
if is_ended(status) then
  return {'ended', status}
end
if run[2] ~= fence then
  if status ~= 'queued' and status ~= 'retrying' then
    return {'taken', run[11] or ''}
  end
  local waiting = runs_in_lane(run[10])
  if waiting and string.match(waiting, '%S+') ~= run_id then
    return {'waiting'}
  end
  if status == 'retrying' and tonumber(run[12] or '0') > NOW then
    return {'waiting'}
  end
  attempt = attempt + 1
  call('HSET', RUN, 'status', 'running', 'attempt', int(attempt), 'fence', fence,
    'worker', worker, 'lease_until_ms', int(NOW + tonumber(ARGV[9])), 'batch', '0', 'answer', '',
    'claimed_ms', int(NOW), 'started_ms', '0', 'updated_ms', int(NOW), 'answers', '{}',
    'max_attempts', ARGV[10], 'stall_after_ms', ARGV[11])
end
if channel.needs_touch then
  touch(channel)
end
return {'claimed', int(attempt), run[4], run[5], run[6], run[7], run[8] or '', run[9],
  channel.epoch}
