-- Give a claimed run back before its attempt has published anything: the attempt does not count.
--
-- ARGV  6 run id  7 fence
--
-- Gives {'ok'} | {'begun'} something was published, or the run is to stop: its worker must end it
--       {'stale'} | {'unknown'}

open_channel()
local run = call('HMGET', RUN, 'status', 'fence', 'attempt', 'batch', 'cancel')
if not run[1] then
  return {'unknown'}
end
if run[2] ~= ARGV[7] or is_ended(run[1]) then
  return {'stale'}
end
if run[4] ~= '0' or run[5] then
  return {'begun'}
end
local attempt = tonumber(run[3]) - 1
call('HSET', RUN, 'status', attempt == 0 and 'queued' or 'retrying',
  'attempt', int(attempt), 'fence', '', 'worker', '', 'retry_at_ms', '0', 'updated_ms', int(NOW))
return {'ok'}
