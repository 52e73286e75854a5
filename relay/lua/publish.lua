-- Publish one batch of one run's current attempt.
--
-- ARGV  6 run id  7 fence  8 batch number, from 1 in each attempt
--       9 epoch of the caller's last acknowledged batch, or ''
--       10 'force' to go on although earlier batches are gone, or ''
--       11 … the events, as _run.lua reads them
--
-- Gives {'ok', epoch, first offset, last offset, seq, cancel flag, next run, its agent}
--       {'expected', batch number}  send again from there (history was rewound)
--       {'hole', batch number}      a batch is missing although nothing was rewound
--       {'stale'} | {'ended', status} | {'unknown'}
-- The same batch number again gives the first answer and appends nothing, also after the end.

local run_id, fence, batch_number = ARGV[6], ARGV[7], tonumber(ARGV[8])

local channel = open_channel()
local run = redis.call('HMGET', RUN, 'status', 'fence', 'seq', 'batch', 'answer', 'cancel')
if not run[1] then
  return {'unknown'}
end
if run[2] ~= fence then
  return {'stale'}
end
local stored_batch = tonumber(run[4] or '0')
if batch_number <= stored_batch then
  if batch_number == stored_batch and run[5] and run[5] ~= '' then
    return cmsgpack.unpack(run[5])
  end
  return {'ok', channel.epoch, '0', '0', run[3], run[6] or '', '', ''}
end
if is_ended(run[1]) then
  return {'ended', run[1]}
end
if run[1] == 'retrying' then
  return {'stale'}
end
if batch_number > stored_batch + 1 and ARGV[10] ~= 'force' then
  if ARGV[9] ~= channel.epoch then
    return {'expected', int(stored_batch + 1)}
  end
  return {'hole', int(stored_batch + 1)}
end

local first = channel.offset + 1
local batch = new_batch()
local outcome = apply_events(channel, batch, run_id, load_progress(), 11, #ARGV)
redis.call('HSET', RUN, 'batch', int(batch_number))
local next_run, next_agent = '', ''
if outcome.ended_at then
  next_run, next_agent = end_run(run_id, outcome)
end
commit(channel, batch)
local answer = {'ok', channel.epoch, int(first), int(channel.offset), int(outcome.seq),
  run[6] or '', next_run, next_agent}
redis.call('HSET', RUN, 'answer', cmsgpack.pack(answer))
return answer
