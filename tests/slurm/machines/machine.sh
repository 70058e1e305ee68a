#!/usr/bin/env bash
# machine.sh NAME ADDRESS DIR DAEMON...: the first process of one machine of the cluster, inside its own network,
# host name, process and mount namespaces. It outlives its daemon, as a machine does, and reaps what it inherits.
set -euo pipefail

name=$1 address=$2 dir=$3
shift 3
hostname "$name"
mount --bind "$dir/etc/hosts" /etc/hosts
mount --bind "$dir/etc/nsswitch.conf" /etc/nsswitch.conf
# up.sh puts the network card in from outside. Where it died before, this ends at the address, and not never.
for ((look = 0; look < 500; look++)); do
    ! ip link set eth0 up 2>/dev/null || break
    sleep 0.02
done
ip link set lo up
ip addr add "$address/24" dev eth0
# A job of another cluster may have started the tests: its variables are none of ours.
unset "${!SLURM_@}"
export SLURM_CONF=$dir/etc/slurm.conf
"$@" >>"$dir/log/$name.out" 2>&1 </dev/null &
sleep infinity &
wait $!
