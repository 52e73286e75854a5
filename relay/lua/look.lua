-- Read the truth about a run, for whoever decides what has to be done about it.
--
-- ARGV  6 run id
--
-- Gives {now in ms, '1' if it is the first of its lane, then LOOK_FIELDS in order, '' for none};
--       {now in ms} where there is no such run.

local LOOK_FIELDS = {'status', 'attempt', 'fence', 'seq', 'agent', 'thread', 'worker',
  'lease_until_ms', 'updated_ms', 'created_ms', 'claimed_ms', 'started_ms', 'retry_at_ms',
  'cancel', 'cancel_ms', 'max_attempts', 'stall_after_ms', 'stalled_ms', 'last_event',
  'open_tools', 'open_inputs'}

open_channel()
local run = call('HMGET', RUN, 'lane', unpack(LOOK_FIELDS))
if not run[2] then
  return {int(NOW)}
end
local lane = runs_in_lane(run[1])
local is_first = not lane or string.match(lane, '%S+') == ARGV[6]
local reply = {int(NOW), is_first and '1' or ''}
for index = 1, #LOOK_FIELDS do
  reply[index + 2] = run[index + 1] or ''
end
return reply
