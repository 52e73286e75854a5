-- Give back the places of connections that are closed; harmless if they are gone already.
--
-- KEYS  1 connections   ARGV  6.. connections

local freed = 0
for index = 6, #ARGV do
  freed = freed + redis.call('HDEL', KEYS[1], ARGV[index])
end
return freed
