-- Open a run that is at work already: accept and claim it in one step. Nobody else carries it out,
-- so it waits for no turn in its thread, no task is written, and it has one attempt.
--
-- ARGV  6 run id  7 agent  8 thread  9 the request's bytes
--       10 bytes of agent_queued  11 their digest  12 most active runs
--       13 fence (random)  14 worker id  15 lease in ms
--       16 ms without progress after which the run counts as stalled
--
-- Gives {'opened', seq, created_ms, epoch} (the same fence again gives the same answer)
--       {'duplicate', status} | {'rate_limited', 'active'}

local run_id, fence = ARGV[6], ARGV[13]

local channel = open_channel()
local known = call('HMGET', RUN, 'status', 'fence', 'created_ms')
if known[1] then
  if known[2] == fence and not is_ended(known[1]) then
    return {'opened', '1', known[3], channel.epoch}
  end
  return {'duplicate', known[1]}
end
if count_lanes(tonumber(ARGV[12])) >= tonumber(ARGV[12]) then
  return {'rate_limited', 'active'}
end

local lane = 'p:' .. run_id
local batch = new_batch()
local offset = append(channel, batch, KIND_EVENT, 1, run_id, ARGV[10], ARGV[11], false)
call('HSET', RUN, 'run_id', run_id, 'agent', ARGV[7], 'thread', ARGV[8], 'lane', lane,
  'status', 'running', 'attempt', '1', 'fence', fence, 'worker', ARGV[14], 'seq', '1',
  'lease_until_ms', int(NOW + tonumber(ARGV[15])), 'batch', '0', 'answer', '', 'answers', '{}',
  'request', ARGV[9], 'open_tools', '{}', 'open_inputs', '{}', 'max_attempts', '1',
  'stall_after_ms', ARGV[16], 'first_offset', int(offset),
  'created_ms', int(NOW), 'claimed_ms', int(NOW), 'updated_ms', int(NOW))
call('PEXPIRE', RUN, RUN_TTL_ACTIVE_MS)
call('ZADD', RUNS, int(offset), run_id)
call('HSET', THREADS, lane, run_id)
channel.needs_touch = true
commit(channel, batch)
return {'opened', '1', int(NOW), channel.epoch}
