-- Accept a user's request as a run, in its thread's order, within the user's quotas.
--
-- ARGV  6 run id (derived from user and message id: the same message gives the same run)
--       7 agent  8 thread  9 policy: enqueue, reject, interrupt or parallel
--       10 the request's bytes, for the worker  11 bytes of agent_queued  12 their digest
--       13 most active runs  14 most queued runs
--
-- Gives {'ok', 'dispatch' | 'wait', epoch, offset, ids of the runs to interrupt …}
--       {'duplicate', status} | {'thread_busy', run id} | {'rate_limited', 'active' | 'queued'}

local run_id, agent, thread, policy = ARGV[6], ARGV[7], ARGV[8], ARGV[9]

local channel = open_channel()
local known = redis.call('HGET', RUN, 'status')
if known then
  return {'duplicate', known}
end
local lane = 't:' .. thread
if policy == 'parallel' then
  lane = 'p:' .. run_id
end
local ahead = redis.call('HGET', THREADS, lane)
if ahead then
  if policy == 'reject' then
    return {'thread_busy', string.match(ahead, '%S+')}
  end
  -- Each lane's first run is active, all behind it are queued.
  local queued = 0
  for _, list in ipairs(redis.call('HVALS', THREADS)) do
    local _, spaces = string.gsub(list, ' ', ' ')
    queued = queued + spaces
  end
  if queued >= tonumber(ARGV[14]) then
    return {'rate_limited', 'queued'}
  end
elseif redis.call('HLEN', THREADS) >= tonumber(ARGV[13]) then
  return {'rate_limited', 'active'}
end

local batch = new_batch()
local offset = append(channel, batch, KIND_EVENT, 1, run_id, ARGV[11], ARGV[12], false)
redis.call('HSET', RUN, 'run_id', run_id, 'agent', agent, 'thread', thread, 'lane', lane,
  'status', 'queued', 'attempt', '0', 'fence', '', 'seq', '1', 'batch', '0', 'request', ARGV[10],
  'open_tools', '{}', 'open_inputs', '{}', 'first_offset', int(offset),
  'last_offset', int(offset), 'created_ms', int(NOW), 'updated_ms', int(NOW))
redis.call('PEXPIRE', RUN, RUN_ACTIVE_MS)
redis.call('ZADD', RUNS, int(offset), run_id)
redis.call('HSET', THREADS, lane, ahead and (ahead .. ' ' .. run_id) or run_id)
channel.needs_touch = true
commit(channel, batch)

local reply = {'ok', ahead and 'wait' or 'dispatch', channel.epoch, int(offset)}
if ahead and policy == 'interrupt' then
  for name in string.gmatch(ahead, '%S+') do
    reply[#reply + 1] = name
  end
end
return reply
