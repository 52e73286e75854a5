-- Publish one batch of one run's current attempt.
--
-- ARGV  6 run id  7 fence  8 batch number, from 1 in each attempt
--       9 epoch of the caller's last acknowledged batch, or ''
--       10 'force' to go on although earlier batches are gone, or ''
--       11 … the events, as _run.lua reads them; the bytes of staged ones lie in
--           upload:<fence>:<batch number>:<index of the event>
--
-- Gives {'ok', epoch, first offset, last offset, seq, cancel flag, next run, its agent}
--       {'expected', batch number}  send again from there (history was rewound)
--       {'hole', batch number}      a batch is missing although nothing was rewound
--       {'staging'}                 the bytes of a staged event are not there: stage them again
--       {'stale'} | {'ended', status} | {'unknown'}
-- The same batch number again gives the first answer, with the cancel flag as it is now, and
-- appends nothing, also after the end.

local run_id, fence, batch_number = ARGV[6], ARGV[7], tonumber(ARGV[8])

local channel = open_channel(true)
local run = call('HMGET', RUN, 'status', 'fence', 'seq', 'batch', 'cancel', 'attempt')
if not run[1] then
  return {'unknown'}
end
if run[2] ~= fence then
  return {'stale'}
end
local stored_batch = tonumber(run[4] or 0)
if batch_number <= stored_batch then
  local first = call('HMGET', RUN, 'answer', 'next_run', 'next_agent')
  local epoch, from, to, seq = string.match(first[1] or '', '^(%S+) (%d+) (%d+) (%d+)$')
  if batch_number == stored_batch and epoch then
    return {'ok', epoch, from, to, seq, run[5] or '', first[2] or '', first[3] or ''}
  end
  return {'ok', channel.epoch, '0', '0', run[3], run[5] or '', '', ''}
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
local function staged(index)
  return BASE .. 'upload:' .. fence .. ':' .. ARGV[8] .. ':' .. int(index)
end
for index = 11, #ARGV, 6 do
  if ARGV[index] == '3' then
    local key, size = staged((index - 11) / 6), ARGV[index + 4]
    if call('HGET', key, 'size') ~= size
      or call('HLEN', key) ~= math.ceil(size / BODY_PIECE_BYTES) + 1 then
      return {'staging'}
    end
  end
end

local before = channel.offset
local batch = new_batch()
-- Room for what applying events notes in it.
local progress = {status = run[1], seq = tonumber(run[3]), attempt = run[6], changes = nil,
  last_event = nil, seq_text = nil, ended_at = nil, ended_with = nil}
apply_events(channel, batch, run_id, progress, 11, #ARGV, staged)
local last, seq = channel.offset_text or int(before), progress.seq_text
local first = channel.offset == before + 1 and last or int(before + 1)
save_run(progress, 'batch', ARGV[8],
  'answer', channel.epoch .. ' ' .. first .. ' ' .. last .. ' ' .. seq)
local next_run, next_agent = '', ''
if progress.ended_at then
  next_run, next_agent = end_run(run_id, progress)
end
commit(channel, batch)
return {'ok', channel.epoch, first, last, seq, run[5] or '', next_run, next_agent}
