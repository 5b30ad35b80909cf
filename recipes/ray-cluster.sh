#!/usr/bin/env bash
# One Ray over several hosts, by ssh:  recipes/ray-cluster.sh start HEAD [HOST …]
#                                      recipes/ray-cluster.sh stop  HEAD [HOST …]
# Every host needs Manta (and `ray` on its PATH), and the first one's name must lead to it from the others.
# Ray's nodes and drivers ask each other for a token. It goes through ssh's standard input into the file where Ray looks
# for it, readable by its owner only, so it is in no command line; ~/.ray/auth_token of this machine is used if there.
set -euo pipefail

[ $# -ge 2 ] || { sed -n '2,3s/^# *//p' "$0"; exit 2; }
verb=$1 head=$2
shift

token() {
  if [ -s ~/.ray/auth_token ]; then cat ~/.ray/auth_token; else od -An -N32 -tx1 /dev/urandom | tr -d ' \n'; fi
}

start() {  # host, arguments of `ray start`
  printf '%s' "$secret" | ssh "$1" "umask 077; mkdir -p ~/.ray; cat > ~/.ray/auth_token; \
    RAY_AUTH_MODE=token RAY_num_workers_soft_limit=64 ${variables-} ray start $2 --disable-usage-stats"
}

case $verb in
  start)
    secret=$(token)
    # How soon the head takes a silent node for lost: seconds, as on a Ray that Manta starts itself.
    variables='RAY_health_check_period_ms=1000 RAY_health_check_timeout_ms=5000 RAY_health_check_failure_threshold=5'
    start "$head" '--head --port 6379'
    for host in "${@:2}"; do start "$host" "--address $head:6379"; done
    echo "on $head: RAY_AUTH_MODE=token manta train --ray_address auto --config …" ;;
  stop)
    for host in "$@"; do ssh "$host" 'ray stop'; done ;;
  *)
    echo "start or stop, not $verb" >&2
    exit 2 ;;
esac
