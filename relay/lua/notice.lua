-- Append a notice: an event of the user that belongs to no run.
--
-- ARGV  6 id of the notice (random)  7 event bytes  8 their digest
--
-- Gives {epoch, offset}. One of the channel's last notices again gives its first answer, so that a
-- notice whose acknowledgement was lost can be sent again.

local MAX_RECENT = 64

local channel = open_channel()
local recent = {}
for id, offset in string.gmatch(call('HGET', CHANNEL, 'notices') or '', '(%S+):(%d+)') do
  if id == ARGV[6] then
    return {channel.epoch, offset}
  end
  if #recent < MAX_RECENT - 1 then
    recent[#recent + 1] = id .. ':' .. offset
  end
end

local batch = new_batch()
local offset = append(channel, batch, KIND_EVENT, 0, '', ARGV[7], ARGV[8], false)
table.insert(recent, 1, ARGV[6] .. ':' .. int(offset))
call('HSET', CHANNEL, 'notices', table.concat(recent, ' '))
channel.needs_touch = true
commit(channel, batch)
return {channel.epoch, int(offset)}
