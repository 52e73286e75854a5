-- Accept a user's request as a run, in its thread's order, within the user's quotas.
--
-- ARGV  6 run id (derived from user and message id: the same message gives the same run)
--       7 agent  8 thread  9 policy: enqueue, reject, interrupt or parallel
--       10 the request's bytes, for the worker  11 bytes of agent_queued  12 their digest
--       13 most active runs  14 most queued runs
--       15 the run that asks for this one, or ''  16 the fence of its attempt
--
-- Gives {'ok', 'dispatch' | 'wait', epoch, offset, ids of the runs to interrupt …}
--       {'duplicate', status, ids of the runs to interrupt …}  those that the first submit was to
--         interrupt, as long as this run waits for them: it may have been cut short
--       {'thread_busy', run id} | {'rate_limited', 'active' | 'queued'}
--       {'parent_gone'}  the run that asks has ended, is to stop, or is in another attempt

local MOST_INTERRUPTING = 8

local function count_behind_first(lane_runs)
  local _, spaces = string.gsub(lane_runs, ' ', ' ')
  return spaces
end

local run_id, agent, thread, policy = ARGV[6], ARGV[7], ARGV[8], ARGV[9]
local parent, parent_fence = ARGV[15], ARGV[16]

local channel = open_channel()
local known = call('HMGET', RUN, 'status', 'lane', 'policy')
if known[1] then
  local reply = {'duplicate', known[1]}
  -- Runs of before there was this field have the policy of the agent as it is now.
  if known[1] == 'queued' and (known[3] or policy) == 'interrupt' then
    for name in string.gmatch(runs_in_lane(known[2]) or '', '%S+') do
      if name == run_id then
        return reply
      end
      reply[#reply + 1] = name
    end
  end
  return {'duplicate', known[1]}
end
local siblings = nil
if parent ~= '' then
  local above = call('HMGET', BASE .. 'run:' .. parent, 'status', 'fence', 'cancel', 'children')
  if not above[1] or is_ended(above[1]) or above[2] ~= parent_fence or above[3] then
    return {'parent_gone'}
  end
  siblings = above[4]
end
local lane = 't:' .. thread
if policy == 'parallel' then
  lane = 'p:' .. run_id
end
local ahead = runs_in_lane(lane)
if ahead then
  if policy == 'reject' then
    return {'thread_busy', string.match(ahead, '%S+')}
  end
  -- Each lane's first run is active, all behind it are queued. One that interrupts needs no place
  -- in the queue: it waits for what it stops, and all others between the two end at once.
  local queued, most = 0, tonumber(ARGV[14])
  if policy == 'interrupt' then
    -- Several wait behind each other only as long as nobody has ended them, which each submit does
    -- after this script. Where that does not happen, there still is a bound.
    queued, most = count_behind_first(ahead), most + MOST_INTERRUPTING
  else
    for _, list in ipairs(call('HVALS', THREADS)) do
      local second = string.match(list, '^%S+ (%S+)')
      if second then
        local is_free = call('HGET', BASE .. 'run:' .. second, 'policy') == 'interrupt'
        queued = queued + count_behind_first(list) - (is_free and 1 or 0)
      end
    end
  end
  if queued >= most then
    return {'rate_limited', 'queued'}
  end
elseif count_lanes(tonumber(ARGV[13])) >= tonumber(ARGV[13]) then
  return {'rate_limited', 'active'}
end

local batch = new_batch()
local offset = append(channel, batch, KIND_EVENT, 1, run_id, ARGV[11], ARGV[12], false)
call('HSET', RUN, 'run_id', run_id, 'agent', agent, 'thread', thread, 'lane', lane, 'policy', policy,
  'status', 'queued', 'attempt', '0', 'fence', '', 'seq', '1', 'batch', '0', 'request', ARGV[10],
  'open_tools', '{}', 'open_inputs', '{}', 'first_offset', int(offset),
  'created_ms', int(NOW), 'updated_ms', int(NOW))
if parent ~= '' then
  call('HSET', RUN, 'parent', parent)
  call('HSET', BASE .. 'run:' .. parent, 'children',
    siblings and (siblings .. ' ' .. run_id) or run_id)
end
call('PEXPIRE', RUN, RUN_TTL_ACTIVE_MS)
call('ZADD', RUNS, int(offset), run_id)
call('HSET', THREADS, lane, ahead and (ahead .. ' ' .. run_id) or run_id)
channel.needs_touch = true
commit(channel, batch)

local reply = {'ok', ahead and 'wait' or 'dispatch', channel.epoch, int(offset)}
if ahead and policy == 'interrupt' then
  for name in string.gmatch(ahead, '%S+') do
    reply[#reply + 1] = name
  end
end
return reply
