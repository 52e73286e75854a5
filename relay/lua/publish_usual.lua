-- Stands before the other parts of publish: what most of its calls are, done without them.
--
-- One event that changes nothing of its run but the counters, for a run that runs, on a channel and
-- a log that are as they should be: then this writes what publish.lua would write, and gives what
-- it would give. Defining all the functions of the general way takes as long as half of these
-- commands. Whatever is not so falls through to them, with nothing written.

local name, event = ARGV[12], ARGV[15]
if ARGV[11] == '0' and not ARGV[17] and (name == 'agent_thinking' or name == 'custom') then
  local call, format, run_id = redis.call, string.format, ARGV[6]
  local clock = call('TIME')
  local now = clock[1] .. format('%03d', clock[2] / 1000)
  local channel = call('HMGET', KEYS[1], 'epoch', 'offset', 'floor', 'tail', 'bytes', 'instance',
    'touched', 'length', 'held')
  local run = call('HMGET', KEYS[7], 'status', 'fence', 'seq', 'batch', 'cancel')
  local epoch = channel[1]
  if epoch and #epoch < 32 and channel[6] == ARGV[1]
    and channel[7] and now - channel[7] <= TOUCH_MS
    -- Something is in the log, and there is nothing to trim: neither of its bounds is reached, or
    -- an active run holds what would go, as the last look has found.
    and channel[4] - channel[3] > 0
    and channel[8] and (channel[8] - ARGV[3] < ARGV[3] / 16 - 1
      or channel[9] and channel[8] - channel[9] < ARGV[3] / 16 - 1
        and channel[8] - ARGV[3] * 10 < 0)
    and channel[5] + #event <= ARGV[5] + 0
    and #event + #run_id + 24 < BODY_THRESHOLD_BYTES
    and run[1] == 'running' and run[2] == ARGV[7] and run[4] and ARGV[8] - run[4] == 1
  then
    local offset, seq = channel[2] + 1, run[3] + 1
    local offset_text, seq_text = format('%d', offset), format('%d', seq)
    -- Nothing comes back where there is no log, and a table where it holds this offset already.
    local added = redis.pcall('XADD', KEYS[2], 'NOMKSTREAM', offset_text, 's', seq_text, 'r', run_id,
      't', now, 'e', event)
    if type(added) == 'string' then
      call('HSET', KEYS[7], 'seq', seq_text, 'updated_ms', now, 'last_event', name,
        'batch', ARGV[8], 'answer', epoch .. ' ' .. offset_text .. ' ' .. offset_text .. ' ' .. seq_text)
      call('HSET', KEYS[1], 'offset', offset_text, 'tail', offset_text,
        'bytes', format('%d', channel[5] + #event), 'length', format('%d', channel[8] + 1))
      -- As _append.lua writes it.
      call('PUBLISH', KEYS[4], '\147' .. string.char(WIRE_VERSION, 160 + #epoch) .. epoch
        .. '\145\149' .. cmsgpack.pack(offset, seq, 0, run_id, event))
      return {'ok', epoch, offset_text, offset_text, seq_text, run[5] or '', '', ''}
    end
  end
end
