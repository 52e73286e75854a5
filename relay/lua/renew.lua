-- Renew the lease of a run. A lease that has expired but was not superseded may be renewed: after
-- an outage that was longer than a lease, living workers keep their runs.
--
-- ARGV  6 run id  7 fence  8 lease in ms
--
-- Gives {'ok', cancel flag, answers} | {'stale'} | {'ended', status} | {'unknown'}

local channel = open_channel()
local run = call('HMGET', RUN, 'status', 'fence', 'cancel', 'answers')
if not run[1] then
  return {'unknown'}
end
if is_ended(run[1]) then
  return {'ended', run[1]}
end
if run[2] ~= ARGV[7] or run[1] == 'retrying' then
  return {'stale'}
end
call('HSET', RUN, 'lease_until_ms', int(NOW + tonumber(ARGV[8])))
call('PEXPIRE', RUN, RUN_TTL_ACTIVE_MS)
if channel.needs_touch then
  touch(channel)
end
return {'ok', run[3] or '', run[4] or ''}
