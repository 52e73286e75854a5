-- Appending to the channel: offsets, the log with its bounds, texts, one PUBLISH.

local function new_batch()
  return {entries = {}, bytes = 0}
end

-- A script that failed after its first write (a key of another type, say) has left entries that no
-- counter knows and nobody was told of. In their way, every later event of this user would fail.
local function drop_unfinished(last)
  for _, entry in ipairs(redis.call('XRANGE', LOG, int(last + 1) .. '-0', '+')) do
    redis.call('XDEL', LOG, entry[1])
    redis.call('UNLINK', BASE .. 'body:' .. string.match(entry[1], '^%d+'))
  end
  redis.call('XSETID', LOG, int(last) .. '-0')
end

local function add_to_log(offset, fields)
  local id = int(offset) .. '-0'
  local reply = redis.pcall('XADD', LOG, id, unpack(fields))
  if type(reply) == 'table' and reply.err then
    if string.find(reply.err, 'equal or smaller', 1, true) then
      drop_unfinished(offset - 1)
    end
    redis.call('XADD', LOG, id, unpack(fields))
  end
end

local function append(channel, batch, kind, seq, run_id, event, digest, is_terminal)
  local offset = channel.offset + 1
  channel.offset = offset
  if kind == KIND_EVENT then
    local fields = {'s', int(seq), 'r', run_id, 't', int(NOW)}
    if is_terminal then
      fields[#fields + 1] = 'x'
      fields[#fields + 1] = '1'
    end
    if #event > BODY_THRESHOLD_BYTES then
      fields[#fields + 1] = 'z'
      fields[#fields + 1] = int(#event)
      fields[#fields + 1] = 'd'
      fields[#fields + 1] = digest
    else
      fields[#fields + 1] = 'e'
      fields[#fields + 1] = event
    end
    add_to_log(offset, fields)
    if #event > BODY_THRESHOLD_BYTES then
      redis.call('SET', BASE .. 'body:' .. int(offset), event,
        'PX', math.max(MAX_AGE_MS + CHANNEL_TTL_MARGIN_MS, RUN_TTL_AFTER_END_MS))
    end
    channel.tail = offset
    channel.bytes = channel.bytes + #event
  end
  batch.entries[#batch.entries + 1] = {offset, seq, kind, run_id, event}
  batch.bytes = batch.bytes + #event + #run_id + 24
  return offset
end

-- Lowest offset of a run that is still active; its events are protected.
local function lowest_active_offset()
  for _, name in ipairs(redis.call('ZRANGE', RUNS, 0, -1)) do
    local run = redis.call('HMGET', BASE .. 'run:' .. name, 'ended_ms', 'first_offset')
    if run[2] and not run[1] then
      return tonumber(run[2])
    end
    if not run[2] or NOW - tonumber(run[1]) > JUST_ENDED_MS then
      redis.call('ZREM', RUNS, name)
    end
  end
  return math.huge
end

local function trim(channel)
  local length = redis.call('XLEN', LOG)
  -- Trimming one entry per publish would cost as much as the publish: let a sixteenth gather.
  local slack = math.floor(MAX_EVENTS / 16)
  -- Where the last try met a protected run at this length, do not read the head again each time.
  local is_held = channel.held > 0 and length <= channel.held + slack
    and length <= 10 * MAX_EVENTS and channel.bytes <= 2 * MAX_BYTES
  local has_many = length > MAX_EVENTS + slack and not is_held
  local is_heavy = channel.bytes > MAX_BYTES and not is_held
  if not (has_many or is_heavy or channel.needs_touch) then
    return
  end
  local oldest_ms = NOW - MAX_AGE_MS
  local protected_from = nil
  local removed = nil
  local done = false
  while not done do
    local head = redis.call('XRANGE', LOG, '-', '+', 'COUNT', 64)
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
        redis.call('UNLINK', BASE .. 'body:' .. int(offset))
      end
      channel.bytes = channel.bytes - (fields.e and #fields.e or tonumber(fields.z))
      length = length - 1
      removed = offset
    end
    if removed and length < before then
      redis.call('XTRIM', LOG, 'MINID', int(removed + 1) .. '-0')
      channel.floor = removed
    else
      done = true
    end
  end
  channel.held = (length > MAX_EVENTS or channel.bytes > MAX_BYTES) and length or 0
end

-- Writes the channel's counters and publishes the batch. The last step of every append.
local function commit(channel, batch)
  trim(channel)
  redis.call('HSET', CHANNEL, 'offset', int(channel.offset), 'floor', int(channel.floor),
    'tail', int(channel.tail), 'bytes', int(channel.bytes), 'held', int(channel.held))
  if channel.needs_touch then
    touch(channel)
  end
  local message
  if batch.bytes < BODY_THRESHOLD_BYTES then
    message = cmsgpack.pack({WIRE_VERSION, channel.epoch, batch.entries})
  else
    -- Claim check: subscribers read the log, their output buffers never hold megabytes.
    local claims = {}
    for index, entry in ipairs(batch.entries) do
      claims[index] = {entry[1], entry[2], entry[3], entry[4], ''}
    end
    message = cmsgpack.pack({WIRE_VERSION, channel.epoch, claims})
  end
  redis.call('PUBLISH', LIVE, message)
end
