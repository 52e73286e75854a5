-- Say again that connections hold their places, whatever the limit: they are open.
--
-- KEYS  1 connections   ARGV  6 node  7.. pairs of connection and client

for index = 7, #ARGV, 2 do
  redis.call('HSET', KEYS[1], ARGV[index], ARGV[6] .. ' ' .. ARGV[index + 1])
end
redis.call('PEXPIRE', KEYS[1], PLACES_TTL_MS)
return 1
