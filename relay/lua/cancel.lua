-- Ask a run to stop. A run that no worker has ends at once; otherwise the flag stays in the run's
-- hash until the run ends, and the caller signals the worker.
--
-- ARGV  6 run id  7 the attempt that the event bytes name  8 cancel flag: JSON of by and reason
--       9 bytes of cancel_requested  10 bytes of agent_cancelled
--
-- Gives {'requested', worker} | {'already', status, worker} | {'cancelled', next run, its agent}
--       {'changed', attempt}  the bytes name another attempt: build them again
--       {'ended', status} | {'unknown'}

local run_id = ARGV[6]

local channel = open_channel()
local run = redis.call('HMGET', RUN, 'status', 'attempt', 'seq', 'cancel', 'worker', 'lane', 'texts')
local status = run[1]
if not status then
  return {'unknown'}
end
if status == 'completed' or status == 'error' or status == 'cancelled' then
  return {'ended', status}
end
if run[4] then
  return {'already', status, run[5] or ''}
end
if run[2] ~= ARGV[7] then
  return {'changed', run[2]}
end

local batch = new_batch()
local seq = tonumber(run[3]) + 1
append(channel, batch, KIND_EVENT, seq, run_id, ARGV[9], '', false)
local is_idle = status == 'queued' or status == 'retrying'
if is_idle then
  seq = seq + 1
  append(channel, batch, KIND_EVENT, seq, run_id, ARGV[10], '', true)
end
redis.call('HSET', RUN, 'seq', int(seq), 'cancel', ARGV[8], 'cancel_ms', int(NOW),
  'last_offset', int(channel.offset), 'updated_ms', int(NOW))
local reply = {'requested', run[5] or ''}
if is_idle then
  local next_run, next_agent =
    end_run(run_id, run[6], run[7], 'cancelled', channel.offset, ARGV[10])
  reply = {'cancelled', next_run, next_agent}
end
commit(channel, batch)
return reply
