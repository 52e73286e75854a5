-- Read a piece of a large event's body, or of a message's text.
--
-- ARGV  6 epoch in which the reader counts  7 'body:<offset>' or 'text:<run>:<attempt>:<message>'
--       8 bytes that it has, a text at least  9 read from this byte on  10 so many
--
-- Gives the bytes, or '' where it or its epoch is gone: after a rewind another event's body may
-- have this offset, but not before the epoch has changed.

local channel = open_channel()
local key = BASE .. ARGV[7]
local size, expected = redis.call('STRLEN', key), tonumber(ARGV[8])
local is_text = string.sub(ARGV[7], 1, 5) == 'text:'
if channel.epoch ~= ARGV[6] or size < expected or (size > expected and not is_text) then
  return ''
end
local first = tonumber(ARGV[9])
return redis.call('GETRANGE', key, int(first), int(first + tonumber(ARGV[10]) - 1))
