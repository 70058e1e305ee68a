#!/usr/bin/env bash
# node.sh COMMAND NODE: what can happen to a node of the cluster of up.sh, which also brings it back.
#   poweroff   every process there is gone at once; its sockets are closed, so peers notice
#   crash      the same, but the network cable goes first: peers hear nothing any more
#   killd      slurmd alone dies; the steps that it started go on
#   exec NODE COMMAND...   run something there
set -euo pipefail
# shellcheck source=tests/slurm/machines/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
command=$1 node=$2
shift 2

pid=$(running "$node") || { echo "$node is not up" >&2 && exit 1; }
case $command in
    poweroff) power_off "$node" ;;
    crash)
        ip link set "$bridge.${node#node}" down
        power_off "$node"
        ;;
    killd) nsenter -t "$pid" --pid --mount pkill -KILL -x slurmd ;;
    exec) exec nsenter -t "$pid" --all -- "$@" ;;
    *)
        sed -n '2,6s/^# //p' "$0" >&2
        exit 2
        ;;
esac
