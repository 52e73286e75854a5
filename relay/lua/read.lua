-- Read a page of history, atomically with the channel's state.
--
-- ARGV  6 read what lies after this offset  7 most bytes (at least one entry is given)
--       8 'runs' to list the active and just-ended runs, or ''
--       9 epoch in which the reader counts  10 … two per text that the reader has in part: its
--         name, the bytes that it has; void in another epoch, where the text may be another one
--
-- Gives {epoch, offset, floor, previous epochs, covered, log entries, texts, runs}
--   entry {offset, seq, run id, event bytes or '', size}; bytes '' and size > 0: in the body key;
--     size 0: the body is lost
--   text  {last offset, name, bytes before, rest of the text, agent, thread, updated_ms, size};
--     rest '' and size > 0: it is large, and read piece by piece
--   run   {run id, then the fields of RUN_FIELDS}
--
-- The page covers (after, covered]. A text stands at its last offset; on the page that reaches
-- the channel's offset no text is cut, so whoever has read that page lacks nothing (ADR 0002).

local RUN_FIELDS = {'agent', 'thread', 'status', 'attempt', 'seq', 'first_offset', 'open_tools',
  'open_inputs', 'cancel', 'created_ms', 'ended_ms', 'result_offset', 'parent'}
local after, max_bytes = tonumber(ARGV[6]), tonumber(ARGV[7])
local PAGE_ENTRIES = 256
-- A text becomes an event with an envelope; many short ones must not burst the page.
local TEXT_ENVELOPE_BYTES = 384

local channel = open_channel()
if channel.needs_touch then
  touch(channel)
end

local known = {}
if ARGV[9] == channel.epoch then
  for index = 10, #ARGV, 2 do
    known[ARGV[index]] = tonumber(ARGV[index + 1])
  end
end

local function read_entry(offset, values)
  local fields = {}
  for index = 1, #values, 2 do
    fields[values[index]] = values[index + 1]
  end
  if fields.e then
    return {offset, fields.s, fields.r, fields.e, #fields.e}
  end
  local has_body = redis.call('EXISTS', BASE .. 'body:' .. int(offset)) == 1
  return {offset, fields.s, fields.r, '', has_body and tonumber(fields.z) or 0}
end

local function read_text(name, last)
  local run_id, attempt = string.match(name, '^([^:]+):(%d+):')
  local run = redis.call('HMGET', BASE .. 'run:' .. run_id, 'agent', 'thread', 'updated_ms',
    'result_offset', 'attempt')
  -- Rule 12: the end of this run is no longer in the log, or a later attempt has superseded
  -- the text: a reader would show it for ever.
  if not run[1] or (run[4] and tonumber(run[4]) <= channel.floor) or run[5] ~= attempt then
    return nil
  end
  local before = known[name] or 0
  local size = redis.call('STRLEN', BASE .. 'text:' .. name)
  if size == 0 then
    redis.call('ZREM', TEXTS, name)
  end
  if size <= before then
    return nil
  end
  size = size - before
  local text = ''
  -- More is not read along: it goes to the client in parts.
  if size <= LARGE_TEXT_BYTES then
    text = redis.call('GETRANGE', BASE .. 'text:' .. name, before, -1)
  end
  return {last, name, int(before), text, run[1], run[2], run[3], int(size)}
end

local stored, marks, log_end = {}, {}, channel.offset
if after < channel.offset then
  -- What lies above the offset was left by a script that failed; nobody was told of it.
  stored = redis.call('XRANGE', LOG, int(after + 1) .. '-0', int(channel.offset) .. '-0', 'COUNT',
    PAGE_ENTRIES)
  if #stored == PAGE_ENTRIES then
    log_end = tonumber(string.match(stored[PAGE_ENTRIES][1], '^(%d+)'))
  end
  marks = redis.call('ZRANGEBYSCORE', TEXTS, '(' .. int(after), int(log_end), 'WITHSCORES')
end

local entries, texts, bytes = {}, {}, 0
local covered = log_end
local log_index, text_index = 1, 1
while log_index <= #stored or text_index <= #marks do
  local log_offset, text_offset = math.huge, math.huge
  if log_index <= #stored then
    log_offset = tonumber(string.match(stored[log_index][1], '^(%d+)'))
  end
  if text_index <= #marks then
    text_offset = tonumber(marks[text_index + 1])
  end
  local size = 0
  local entry, text
  if log_offset < text_offset then
    entry = read_entry(log_offset, stored[log_index][2])
    log_index = log_index + 1
    size = #entry[4]
  else
    text = read_text(marks[text_index], marks[text_index + 1])
    text_index = text_index + 2
    size = text and #text[4] + TEXT_ENVELOPE_BYTES or 0
  end
  if bytes + size > max_bytes and bytes > 0 then
    covered = math.min(log_offset, text_offset) - 1
    break
  end
  bytes = bytes + size
  if entry then
    entries[#entries + 1] = entry
  elseif text then
    texts[#texts + 1] = text
  end
end
if covered < after then
  covered = after
end

local runs = {}
if ARGV[8] == 'runs' then
  for _, name in ipairs(redis.call('ZRANGE', RUNS, 0, -1)) do
    local run = redis.call('HMGET', BASE .. 'run:' .. name, unpack(RUN_FIELDS))
    if not run[1] or (run[11] and NOW - tonumber(run[11]) > JUST_ENDED_MS) then
      redis.call('ZREM', RUNS, name)
    else
      local row = {name}
      for index = 1, #RUN_FIELDS do
        row[index + 1] = run[index] or ''
      end
      runs[#runs + 1] = row
    end
  end
end
return {channel.epoch, int(channel.offset), int(channel.floor), channel.previous, int(covered),
  entries, texts, runs}
