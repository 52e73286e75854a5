-- Every script but publish, which has its usual case before it, begins with this file: one user's
-- channel, opened by the rules that keep it right.
--
-- KEYS  1 channel  2 log  3 texts  4 live  5 runs  6 threads  (7 run, where one is concerned)
-- ARGV  1 instance: master_replid as the caller learned it when it connected
--       2 epoch: a random one, used only if this call has to begin a new history
--       3 most events in the log  4 their greatest age in ms  5 their greatest sum in bytes
--       6 … the operation's own
--
-- Times, sizes and versions in capitals that are not defined here come from relay/keys.py: the values
-- of its SCRIPT_CONSTANTS are put in their place when the scripts are loaded.
--
-- Order of work in every operation: open the channel, check everything, then write.

local CHANNEL, LOG, TEXTS, LIVE, RUNS, THREADS, RUN =
  KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6], KEYS[7]
local BASE = string.sub(CHANNEL, 1, -8)
local MAX_EVENTS, MAX_AGE_MS, MAX_BYTES = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])

local KIND_EVENT, KIND_TEXT = 0, 1
local MAX_PREVIOUS = 8

-- All of this is run anew with each call: helpers of what is rare stand within the rare functions,
-- where they cost nothing until then. Numbers may be given to Redis as they are: it writes them with
-- all their digits, by way of floating point, which costs as much as a short command. What every
-- publish writes is therefore turned into text here, once each.
local call, format = redis.call, string.format
local clock = call('TIME')
local NOW = clock[1] * 1000 + math.floor(clock[2] / 1000)
local NOW_TEXT = clock[1] .. format('%03d', clock[2] / 1000)

-- Lua writes large numbers with an exponent; our replies need plain digits.
local function int(number)
  return format('%.0f', number)
end

local function server_instance()
  local info = call('INFO', 'replication')
  return string.match(info, 'master_replid:(%x+)') or ARGV[1]
end

local function begin_epoch(channel, instance)
  -- Where history was rewound, a text of an active run stands further back than some reader was
  -- told before: whoever skipped it there would wait for it in vain. In a new epoch these texts
  -- stand anew, behind everything that survived.
  local function stand_texts_anew()
    for _, run_id in ipairs(call('ZRANGE', RUNS, 0, -1)) do
      local run = call('HMGET', BASE .. 'run:' .. run_id, 'ended_ms', 'attempt', 'texts')
      if run[3] and not run[1] then
        for name in string.gmatch(run[3], '%S+') do
          if string.match(name, '^[^:]+:(%d+):') == run[2]
            and call('EXISTS', BASE .. 'text:' .. name) == 1 then
            channel.offset = channel.offset + 1
            call('ZADD', TEXTS, channel.offset, name)
          end
        end
      end
    end
  end

  local previous = channel.epoch .. ':' .. int(channel.offset)
  local kept = 1
  for entry in string.gmatch(channel.previous, '%S+') do
    if kept < MAX_PREVIOUS then
      previous = previous .. ' ' .. entry
      kept = kept + 1
    end
  end
  channel.previous = previous
  channel.epoch = ARGV[2]
  channel.instance = instance
  stand_texts_anew()
  call('HSET', CHANNEL, 'epoch', channel.epoch, 'previous', previous, 'instance', instance,
    'offset', channel.offset)
  -- An empty batch of another epoch makes every gateway read the channel again.
  call('PUBLISH', LIVE, cmsgpack.pack({WIRE_VERSION, channel.epoch, {}}))
end

local function touch(channel)
  channel.touched = NOW
  channel.needs_touch = false
  call('HSET', CHANNEL, 'touched', NOW)
  -- The channel goes before its log, never after: a log without its counters is dropped as a
  -- whole, counters without their log would promise events that are gone.
  call('PEXPIRE', CHANNEL, MAX_AGE_MS)
  call('PEXPIRE', LOG, MAX_AGE_MS + CHANNEL_TTL_MARGIN_MS)
  call('PEXPIRE', TEXTS, math.max(RUN_TTL_ACTIVE_MS, MAX_AGE_MS + CHANNEL_TTL_MARGIN_MS))
  call('PEXPIRE', RUNS, RUN_TTL_ACTIVE_MS)
  call('PEXPIRE', THREADS, RUN_TTL_ACTIVE_MS)
end

-- Rule 3. The log was lost: what it held can no longer be read.
local function note_lost_log(channel)
  channel.needs_touch = true
  channel.length = 0
  if channel.tail > channel.floor then
    channel.floor = channel.tail
    channel.bytes = 0
    call('HSET', CHANNEL, 'floor', channel.floor, 'bytes', 0, 'length', 0)
  end
end

-- A caller that does nothing with the log but append may leave it to that to find the log lost.
local function open_channel(only_appends)
  local stored = call('HMGET', CHANNEL, 'epoch', 'offset', 'floor', 'tail', 'bytes', 'instance',
    'previous', 'touched', 'held', 'length')
  if not stored[1] then
    -- Rule 2. Entries of a history whose counters are gone would hide behind the new offsets.
    for _, name in ipairs(call('ZRANGE', TEXTS, 0, -1)) do
      call('UNLINK', BASE .. 'text:' .. name)
    end
    call('UNLINK', LOG, TEXTS)
    local channel = {epoch = ARGV[2], offset = 0, floor = 0, tail = 0, bytes = 0,
      instance = server_instance(), previous = '', touched = NOW, held = 0, length = 0,
      needs_touch = true}
    call('HSET', CHANNEL, 'epoch', channel.epoch, 'offset', 0, 'floor', 0, 'tail', 0, 'bytes', 0,
      'instance', channel.instance, 'previous', '', 'touched', NOW, 'length', 0)
    call('PEXPIRE', CHANNEL, MAX_AGE_MS)
    return channel
  end
  -- The length is a hint that says when to look: the log's own one counts.
  local channel = {epoch = stored[1], offset = tonumber(stored[2]), floor = tonumber(stored[3]),
    tail = tonumber(stored[4]), bytes = tonumber(stored[5]), instance = stored[6],
    previous = stored[7] or '', touched = tonumber(stored[8] or 0), held = tonumber(stored[9] or 0),
    length = tonumber(stored[10] or MAX_EVENTS * 2), needs_touch = false}
  if stored[6] ~= ARGV[1] then
    -- Rule 1. Ask the server itself: a caller may have connected before a failover.
    local instance = server_instance()
    if stored[6] ~= instance then
      begin_epoch(channel, instance)
    end
  end
  if not only_appends and call('EXISTS', LOG) == 0 then
    note_lost_log(channel)
  end
  if NOW - channel.touched > TOUCH_MS then
    channel.needs_touch = true
  end
  return channel
end
