-- Read a piece of a large event's body, or of a message's text.
--
-- ARGV  6 epoch in which the reader counts  7 'body:<offset>' or 'text:<run>:<attempt>:<message>'
--       8 bytes that it has, a text at least  9 read from this byte on  10 so many
--
-- Gives the bytes, or '' where it or its epoch is gone: after a rewind another event's body may
-- have this offset, but not before the epoch has changed.

local channel = open_channel()
local key = BASE .. ARGV[7]
local is_text = string.sub(ARGV[7], 1, 5) == 'text:'
local size = is_text and call('STRLEN', key) or tonumber(call('HGET', key, 'size') or 0)
local expected = tonumber(ARGV[8])
if channel.epoch ~= ARGV[6] or size < expected or (size > expected and not is_text) then
  return ''
end
local first = tonumber(ARGV[9])
local last = first + tonumber(ARGV[10]) - 1
if is_text then
  return call('GETRANGE', key, first, last)
end
local pieces = {}
for number = math.floor(first / BODY_PIECE_BYTES), math.floor(last / BODY_PIECE_BYTES) do
  local from = number * BODY_PIECE_BYTES
  local piece = call('HGET', key, number) or ''
  pieces[#pieces + 1] = string.sub(piece, math.max(first - from, 0) + 1, last - from + 1)
end
return table.concat(pieces)
