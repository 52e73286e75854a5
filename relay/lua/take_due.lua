-- Take what is due from a shard of the deadline index. What is taken comes up again after a
-- while, in case whoever took it dies before saying when to look next.
--
-- KEYS  1 shard   ARGV  1 most entries  2 ms after which they come up again
--
-- Gives the members.

local clock = redis.call('TIME')
local now = tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000)
local due = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', string.format('%.0f', now),
  'LIMIT', 0, tonumber(ARGV[1]))
for _, member in ipairs(due) do
  redis.call('ZADD', KEYS[1], string.format('%.0f', now + tonumber(ARGV[2])), member)
end
return due
