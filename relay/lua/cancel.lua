-- Ask a run to stop. A run that no worker has ends at once; otherwise the flag stays in the run's
-- hash until the run ends, and the caller signals the worker.
--
-- ARGV  6 run id  7 the attempt that the event bytes name  8 cancel flag: JSON of by and reason
--       9 … the events, as _run.lua reads them: cancel_requested, then agent_cancelled, which is
--           only for a run that no worker has
--
-- Gives {'requested', worker} | {'already', status, worker} | {'cancelled', next run, its agent}
--       {'changed', attempt}  the bytes name another attempt: build them again
--       {'ended', status, cancel flag, next run, its agent}  whose the flag is says whether the run
--         ended because the caller asked for it; the next run where it still waits, or ''
--       {'unknown'}

local run_id = ARGV[6]

local channel = open_channel()
local run = call('HMGET', RUN, 'status', 'attempt', 'cancel', 'worker')
local status = run[1]
if not status then
  return {'unknown'}
end
if is_ended(status) then
  local later = call('HMGET', RUN, 'next_run', 'next_agent')
  local next_run = later[1] or ''
  if next_run == '' or call('HGET', BASE .. 'run:' .. next_run, 'status') ~= 'queued' then
    return {'ended', status, run[3] or '', '', ''}
  end
  return {'ended', status, run[3] or '', next_run, later[2] or ''}
end
if run[3] then
  return {'already', status, run[4] or ''}
end
if run[2] ~= ARGV[7] then
  return {'changed', run[2]}
end

local batch = new_batch()
local progress = load_progress()
local is_idle = status == 'queued' or status == 'retrying'
local outcome = apply_events(channel, batch, run_id, progress, 9, is_idle and #ARGV or 14)
save_run(outcome, 'cancel', ARGV[8], 'cancel_ms', NOW)
local reply = {'requested', run[4] or ''}
if is_idle then
  local next_run, next_agent = end_run(run_id, outcome)
  reply = {'cancelled', next_run, next_agent}
end
commit(channel, batch)
return reply
