-- Begin a new epoch because a gateway has seen what Redis no longer has: history was rewound
-- without a change of instance that we could notice. Compare-and-set: a lost race adopts the winner's.
--
-- ARGV  6 the epoch that the caller knows to be broken
--
-- Gives {epoch} that is in force now.

local channel = open_channel()
if channel.epoch == ARGV[6] then
  begin_epoch(channel, channel.instance)
end
return {channel.epoch}
