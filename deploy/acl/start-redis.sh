#!/bin/sh
# Starts Redis with the users of this folder: sh start-redis.sh OPTION...
#
# Their passwords are in REDIS_GATEWAY_PASSWORD, REDIS_WORKER_PASSWORD and REDIS_OPERATOR_PASSWORD;
# a user without one cannot log in. Who does not log in may only PING, for the health check.
set -euf
umask 077

here=${0%/*}
users=${TMPDIR:-/tmp}/relay-users.conf

add() { # add ROLE PASSWORD
  read -r rules <"$here/$1.acl"
  printf '%s%s\n' "$rules" "${2:+ >$2}"
}

# In a file, because every process of the machine can read command lines.
{
  add gateway "${REDIS_GATEWAY_PASSWORD:-}"
  add worker "${REDIS_WORKER_PASSWORD:-}"
  add operator "${REDIS_OPERATOR_PASSWORD:-}"
  echo 'user default on nopass resetkeys resetchannels -@all +ping'
} >"$users"
# The official image starts as root and gives Redis its own user.
chown redis "$users" 2>/dev/null || true
unset REDIS_GATEWAY_PASSWORD REDIS_WORKER_PASSWORD REDIS_OPERATOR_PASSWORD

exec docker-entrypoint.sh redis-server "$users" "$@"
