-- Take a place for a connection of this user, or say who holds all of them.
--
-- KEYS  1 connections: hash, connection -> 'node client' (client is empty where it named none)
-- ARGV  6 connection (empty: only look)  7 node  8 client  9 most places
--       10.. names of nodes that are dead, and of connections that no longer are: they hold nothing
--
-- A connection of the same client gives up its place: the device came back before its old
-- connection was noticed to be dead. Calling again for the same connection changes nothing.
--
-- Gives {1, connection, node, ...} with the connections of the same client, or
-- {0, connection, node, ...} with all that hold a place.

local connection, node, client = ARGV[6], ARGV[7], ARGV[8]
local is_gone = {}
for index = 10, #ARGV do
  is_gone[ARGV[index]] = true
end

local places = redis.call('HGETALL', KEYS[1])
local freed, replaced, full, taken = {}, {1}, {0}, 0
for index = 1, #places, 2 do
  local holder = places[index]
  local at, whose = string.match(places[index + 1], '^(%S+) (.*)$')
  if not at or is_gone[at] or is_gone[holder] then
    freed[#freed + 1] = holder
  elseif holder ~= connection and client ~= '' and whose == client then
    freed[#freed + 1] = holder
    replaced[#replaced + 1] = holder
    replaced[#replaced + 1] = at
  elseif holder ~= connection then
    taken = taken + 1
    full[#full + 1] = holder
    full[#full + 1] = at
  end
end

if taken >= tonumber(ARGV[9]) then
  return full
end
if connection ~= '' then
  for _, holder in ipairs(freed) do
    redis.call('HDEL', KEYS[1], holder)
  end
  redis.call('HSET', KEYS[1], connection, node .. ' ' .. client)
  redis.call('PEXPIRE', KEYS[1], PLACES_TTL_MS)
end
return replaced
