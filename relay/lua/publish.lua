-- Publish one batch of one run's current attempt.
--
-- ARGV  6 run id  7 fence  8 batch number, from 1 in each attempt
--       9 epoch of the caller's last acknowledged batch, or ''
--       10 'force' to go on although earlier batches are gone, or ''
--       11 … six per event: kind, op, id, value, event bytes, extra
--            op of lifecycle events: '' start tool+ tool- input+ input- retry end; id and value:
--            tool call id and name, request id and its JSON, for `end` the status in value;
--            extra: digest of the bytes. Of texts: id message, value text, extra bytes before it.
--
-- Gives {'ok', epoch, first offset, last offset, seq, cancel flag, next run, its agent}
--       {'expected', batch number}  send again from there (history was rewound)
--       {'hole', batch number}      a batch is missing although nothing was rewound
--       {'stale'} | {'ended', status} | {'unknown'}
-- The same batch number again gives the first answer and appends nothing, also after the end.

local run_id, fence, batch_number = ARGV[6], ARGV[7], tonumber(ARGV[8])

local channel = open_channel()
local run = redis.call('HMGET', RUN, 'status', 'fence', 'seq', 'batch', 'answer', 'attempt', 'lane',
  'texts', 'cancel', 'open_tools', 'open_inputs')
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
  return {'ok', channel.epoch, '0', '0', run[3], run[9] or '', '', ''}
end
if run[1] == 'completed' or run[1] == 'error' or run[1] == 'cancelled' then
  return {'ended', run[1]}
end
if batch_number > stored_batch + 1 and ARGV[10] ~= 'force' then
  if ARGV[9] ~= channel.epoch then
    return {'expected', int(stored_batch + 1)}
  end
  return {'hole', int(stored_batch + 1)}
end

local batch = new_batch()
local first = channel.offset + 1
local seq = tonumber(run[3])
local attempt = run[6]
local texts = run[8] or ''
local tools, inputs = nil, nil
local status = run[1]
local ended_at, ended_with = nil, nil

for index = 11, #ARGV, 6 do
  local kind, op, id, value = tonumber(ARGV[index]), ARGV[index + 1], ARGV[index + 2], ARGV[index + 3]
  local event, extra = ARGV[index + 4], ARGV[index + 5]
  if kind == KIND_EVENT then
    seq = seq + 1
    local offset = append(channel, batch, kind, seq, run_id, event, extra, op == 'end')
    if op == 'start' then
      status = 'running'
      redis.call('HSET', RUN, 'started_ms', int(NOW))
    elseif op == 'tool+' or op == 'tool-' then
      tools = tools or cjson.decode(run[10] or '{}')
      tools[id] = op == 'tool+' and value or nil
    elseif op == 'input+' or op == 'input-' then
      inputs = inputs or cjson.decode(run[11] or '{}')
      inputs[id] = op == 'input+' and value or nil
      status = next(inputs) and 'waiting' or 'running'
    elseif op == 'retry' then
      status = 'retrying'
    elseif op == 'end' then
      status, ended_at, ended_with = value, offset, event
    end
  else
    local offset = append(channel, batch, kind, 0, run_id, event, '', false)
    if kind == KIND_TEXT then
      local name = run_id .. ':' .. attempt .. ':' .. id
      local key = BASE .. 'text:' .. name
      local length = redis.call('APPEND', key, value)
      if length ~= tonumber(extra) + #value then
        -- A piece before this one is gone (key lost, history rewound). A text with a silent
        -- hole is worse than none: readers see the hole by position and get the result.
        redis.call('UNLINK', key)
        redis.call('ZREM', TEXTS, name)
      else
        redis.call('ZADD', TEXTS, int(offset), name)
        if length == #value then
          redis.call('PEXPIRE', key, RUN_ACTIVE_MS)
          redis.call('PEXPIRE', TEXTS, RUN_ACTIVE_MS)
          texts = texts .. ' ' .. name
        end
      end
    end
  end
end

local next_run, next_agent = '', ''
local fields = {'seq', int(seq), 'batch', int(batch_number), 'status', status,
  'last_offset', int(channel.offset), 'updated_ms', int(NOW)}
if texts ~= (run[8] or '') then
  fields[#fields + 1] = 'texts'
  fields[#fields + 1] = texts
end
if tools then
  fields[#fields + 1] = 'open_tools'
  fields[#fields + 1] = cjson.encode(tools)
end
if inputs then
  fields[#fields + 1] = 'open_inputs'
  fields[#fields + 1] = cjson.encode(inputs)
end
redis.call('HSET', RUN, unpack(fields))
if ended_at then
  next_run, next_agent = end_run(run_id, run[7], texts, status, ended_at, ended_with)
end
commit(channel, batch)
local answer = {'ok', channel.epoch, int(first), int(channel.offset), int(seq), run[9] or '',
  next_run, next_agent}
redis.call('HSET', RUN, 'answer', cmsgpack.pack(answer))
return answer
