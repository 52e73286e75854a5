-- Appending to the channel: offsets, the log with its bounds, texts, one PUBLISH.

-- Entries lie flat: five values for each, in the order of a live message.
local function new_batch()
  return {entries = nil, count = 0, bytes = 0, has_logged = false}
end

-- `offset` is text.
local function add_to_log(channel, offset, ...)
  -- Rule 3: where the log should hold something, appending must not make a new one unnoticed.
  local reply
  if channel.tail > channel.floor then
    reply = redis.pcall('XADD', LOG, 'NOMKSTREAM', offset, ...)
    if not reply then
      note_lost_log(channel)
    end
  end
  if not reply then
    reply = redis.pcall('XADD', LOG, offset, ...)
    channel.needs_touch = channel.needs_touch or channel.length == 0
  end
  if type(reply) ~= 'table' or not reply.err then
    return
  end
  if string.find(reply.err, 'equal or smaller', 1, true) then
    -- A script that failed after its first write (a key of another type, say) has left entries
    -- that no counter knows and nobody was told of. In their way, every later event of this user
    -- would fail.
    for _, entry in ipairs(call('XRANGE', LOG, offset .. '-0', '+')) do
      call('XDEL', LOG, entry[1])
      call('UNLINK', BASE .. 'body:' .. string.match(entry[1], '^%d+'))
    end
    call('XSETID', LOG, int(offset - 1) .. '-0')
  end
  call('XADD', LOG, offset, ...)
end

-- Offsets, seqs and sizes as text go through `%d`, which is quicker than `int`; it takes what a long
-- takes, which where that has 32 bits is still more than any of them. Times in ms are more than that.

-- `staged` names the key that holds the bytes of an event that is not in the arguments; `event` is
-- then its size.
local function append(channel, batch, kind, seq, run_id, event, digest, is_terminal, staged)
  local offset = channel.offset + 1
  local text = format('%d', offset)
  channel.offset, channel.offset_text = offset, text
  local size = staged and tonumber(event) or #event
  if kind == KIND_EVENT then
    local number = format('%d', seq)
    if size <= BODY_THRESHOLD_BYTES then
      if is_terminal then
        add_to_log(channel, text, 's', number, 'r', run_id, 't', NOW_TEXT, 'x', '1', 'e', event)
      else
        add_to_log(channel, text, 's', number, 'r', run_id, 't', NOW_TEXT, 'e', event)
      end
    else
      if is_terminal then
        add_to_log(channel, text, 's', number, 'r', run_id, 't', NOW_TEXT, 'x', '1', 'z', size, 'd', digest)
      else
        add_to_log(channel, text, 's', number, 'r', run_id, 't', NOW_TEXT, 'z', size, 'd', digest)
      end
      local key = BASE .. 'body:' .. text
      local ttl_ms = math.max(MAX_AGE_MS + CHANNEL_TTL_MARGIN_MS, RUN_TTL_AFTER_END_MS)
      if staged then
        call('RENAME', staged, key)
      else
        local fields = {'size', size}
        for at = 0, size - 1, BODY_PIECE_BYTES do
          fields[#fields + 1] = at / BODY_PIECE_BYTES
          fields[#fields + 1] = string.sub(event, at + 1, at + BODY_PIECE_BYTES)
        end
        call('UNLINK', key)
        call('HSET', key, unpack(fields))
      end
      call('PEXPIRE', key, ttl_ms)
    end
    channel.tail = offset
    channel.bytes = channel.bytes + size
    channel.length = channel.length + 1
    batch.has_logged = true
  end
  local entries, at, body = batch.entries, batch.count * 5, staged and '' or event
  if entries then
    entries[at + 1], entries[at + 2], entries[at + 3] = offset, seq, kind
    entries[at + 4], entries[at + 5] = run_id, body
  else
    -- Most batches have one event: a table of its size need not grow step by step.
    batch.entries = {offset, seq, kind, run_id, body}
  end
  batch.count = batch.count + 1
  batch.bytes = batch.bytes + size + #run_id + 24
  return offset
end

local function trim(channel)
  if not channel.needs_touch and channel.length <= MAX_EVENTS and channel.bytes <= MAX_BYTES then
    return
  end
  -- Trimming one entry per publish would cost as much as the publish: let a sixteenth gather.
  local slack = math.floor(MAX_EVENTS / 16)
  local function must_look(length)
    -- Where the last try met a protected run at this length, do not read the head again each time.
    local is_held = channel.held > 0 and length <= channel.held + slack
      and length <= 10 * MAX_EVENTS and channel.bytes <= 2 * MAX_BYTES
    return channel.needs_touch
      or not is_held and (length > MAX_EVENTS + slack or channel.bytes > MAX_BYTES)
  end
  if not must_look(channel.length) then
    return
  end
  channel.has_new_bounds = true
  channel.length = call('XLEN', LOG)
  if not must_look(channel.length) then
    return
  end

  -- Lowest offset of a run that is still active; its events are protected.
  local function lowest_active_offset()
    for _, name in ipairs(call('ZRANGE', RUNS, 0, -1)) do
      local run = call('HMGET', BASE .. 'run:' .. name, 'ended_ms', 'first_offset')
      if run[2] and not run[1] then
        return tonumber(run[2])
      end
      if not run[2] or NOW - tonumber(run[1]) > JUST_ENDED_MS then
        call('ZREM', RUNS, name)
      end
    end
    return math.huge
  end

  local length = channel.length
  local oldest_ms = NOW - MAX_AGE_MS
  local protected_from = nil
  local removed = nil
  local done = false
  while not done do
    local head = call('XRANGE', LOG, '-', '+', 'COUNT', 64)
    if #head == 0 then
      break
    end
    local before = length
    for _, entry in ipairs(head) do
      local fields = {}
      for index = 1, #entry[2], 2 do
        fields[entry[2][index]] = entry[2][index + 1]
      end
      local offset = tonumber(string.match(entry[1], '^(%d+)'))
      local is_old = tonumber(fields.t or '0') < oldest_ms
      if not (length > MAX_EVENTS or channel.bytes > MAX_BYTES or is_old) or offset == channel.tail then
        done = true
        break
      end
      protected_from = protected_from or lowest_active_offset()
      if offset >= protected_from and length <= 10 * MAX_EVENTS and channel.bytes <= 2 * MAX_BYTES then
        done = true
        break
      end
      if fields.z and not fields.x then
        -- A terminal event's body stays readable as the run's result; it expires by itself.
        call('UNLINK', BASE .. 'body:' .. int(offset))
      end
      channel.bytes = channel.bytes - (fields.e and #fields.e or tonumber(fields.z))
      length = length - 1
      removed = offset
    end
    if removed and length < before then
      call('XTRIM', LOG, 'MINID', int(removed + 1) .. '-0')
      channel.floor = removed
    else
      done = true
    end
  end
  channel.length = length
  channel.held = (length > MAX_EVENTS or channel.bytes > MAX_BYTES) and length or 0
end

-- A live message: msgpack of [version, epoch, [[offset, seq, kind, run id, event], …]], written
-- from its parts because tables for the packer cost more than the rest of it. 0x93 begins an array
-- of three, 0x95 one of five, 0x9n one of n, 0xdc a longer one, 0xa0 and the length a short text.
local function live_message(channel, batch)
  local entries, count = batch.entries, batch.count
  local pack = cmsgpack.pack
  -- Claim check: subscribers read the log, their output buffers never hold megabytes.
  local is_claim = batch.bytes >= BODY_THRESHOLD_BYTES
  if count == 1 and #channel.epoch < 32 then
    return '\147' .. string.char(WIRE_VERSION, 160 + #channel.epoch) .. channel.epoch .. '\145\149'
      .. pack(entries[1], entries[2], entries[3], entries[4], is_claim and '' or entries[5])
  end
  local parts = {'\147', pack(WIRE_VERSION, channel.epoch), count < 16 and string.char(144 + count)
    or '\220' .. string.char(math.floor(count / 256), count % 256)}
  for index = 1, count do
    local at = index * 5
    parts[index + 3] = '\149' .. pack(entries[at - 4], entries[at - 3], entries[at - 2],
      entries[at - 1], is_claim and '' or entries[at])
  end
  return table.concat(parts)
end

-- Writes the channel's counters and publishes the batch. The last step of every append.
local function commit(channel, batch)
  if batch.has_logged or channel.needs_touch then
    trim(channel)
  end
  local offset = channel.offset_text or channel.offset
  if channel.has_new_bounds then
    call('HSET', CHANNEL, 'offset', offset, 'tail', channel.tail, 'bytes', channel.bytes,
      'length', channel.length, 'floor', channel.floor, 'held', channel.held)
  elseif batch.has_logged then
    local tail = channel.tail == channel.offset and offset or channel.tail
    call('HSET', CHANNEL, 'offset', offset, 'tail', tail, 'bytes', format('%d', channel.bytes),
      'length', format('%d', channel.length))
  else
    call('HSET', CHANNEL, 'offset', offset)
  end
  if channel.needs_touch then
    touch(channel)
  end
  call('PUBLISH', LIVE, live_message(channel, batch))
end
