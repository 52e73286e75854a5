-- Append events to a run on behalf of somebody else than its worker: the reaper.
-- Compare-and-set on what the caller has seen, so that one of several reapers wins.
--
-- ARGV  6 run id  7 fence and  8 seq as seen  9 status as seen
--       10 'lease': only if the lease has expired; 'stall': only if nothing came since the time in
--          11; '' : no further condition
--       11 updated_ms as seen  12 'supersede': no attempt may publish any more
--       13 … the events, as _run.lua reads them
--
-- Gives {'ok', next run, its agent, offset} | {'changed'} | {'unknown'}

local run_id = ARGV[6]

local channel = open_channel()
local run = call('HMGET', RUN, 'status', 'fence', 'seq', 'lease_until_ms', 'updated_ms')
if not run[1] then
  return {'unknown'}
end
if run[1] ~= ARGV[9] or run[2] ~= ARGV[7] or run[3] ~= ARGV[8] then
  return {'changed'}
end
if ARGV[10] == 'lease' and tonumber(run[4] or '0') > NOW then
  return {'changed'}
end
if ARGV[10] == 'stall' and run[5] ~= ARGV[11] then
  return {'changed'}
end

local batch = new_batch()
local outcome = apply_events(channel, batch, run_id, load_progress(), 13, #ARGV)
save_run(outcome)
if ARGV[12] == 'supersede' then
  call('HSET', RUN, 'fence', '', 'worker', '')
end
if ARGV[10] == 'stall' then
  call('HSET', RUN, 'stalled_ms', int(NOW))
end
local next_run, next_agent = '', ''
if outcome.ended_at then
  next_run, next_agent = end_run(run_id, outcome)
end
commit(channel, batch)
return {'ok', next_run, next_agent, int(channel.offset)}
