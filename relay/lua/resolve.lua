-- Resolve an open input request: the first answer wins, whoever gives it.
--
-- ARGV  6 run id  7 request id  8 the attempt that the event bytes name
--       9 the answer for the worker, as JSON  10 … input_resolved, as _run.lua reads it
--
-- Gives {'ok', worker, offset} | {'closed'} no such open request | {'changed', attempt}
--       {'answered', status, the answer that counts, worker}  this attempt's request has one
--         already: the caller compares, whose own it may be
--       {'ended', status} | {'unknown'}

local run_id, request_id = ARGV[6], ARGV[7]

local channel = open_channel()
local run = call('HMGET', RUN, 'status', 'attempt', 'open_inputs', 'worker', 'answers')
if not run[1] then
  return {'unknown'}
end
local is_open = cjson.decode(run[3] or '{}')[request_id]
local answers = cjson.decode(run[5] or '{}')
-- Before the run's end: its worker may have ended it with this very answer.
if answers[request_id] and not is_open then
  return {'answered', run[1], answers[request_id], run[4] or ''}
end
if is_ended(run[1]) then
  return {'ended', run[1]}
end
if not is_open then
  return {'closed'}
end
if run[2] ~= ARGV[8] then
  return {'changed', run[2]}
end

local batch = new_batch()
local progress = apply_events(channel, batch, run_id, load_progress(), 10, #ARGV)
-- The answer stays in the hash until the attempt ends: its worker may not hear the signal.
answers[request_id] = ARGV[9]
save_run(progress, 'answers', cjson.encode(answers))
commit(channel, batch)
return {'ok', run[4] or '', int(channel.offset)}
