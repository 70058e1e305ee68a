#!/usr/bin/env bash
# Bring up a real SLURM cluster on this one Debian machine, for tests: a controller and nodes with 8 fake GPUs each,
# every one a machine of its own (network, host name, process and mount namespaces). Needs root. Run again, it
# brings dead nodes back. Exit 69: this machine cannot carry it, and why.
#
#   SLURM_TEST_DIR   where everything lives, outside the repository (default /var/tmp/s3-slurm)
#   NODES            how many nodes (default 4)
#   FRESH=1          end what runs there and forget its jobs first
set -euo pipefail
# shellcheck source=tests/slurm/machines/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
nodes=${NODES:-4}

[[ $dir =~ ^/[A-Za-z0-9_./-]+$ ]] || cannot "SLURM_TEST_DIR=$dir is not an absolute path of plain characters"
[ "$(id -u)" = 0 ] || cannot "it needs root, for namespaces and a network bridge"

programs_missing() {
    local program
    for program in slurmctld slurmd sbatch munged ip pgrep; do
        command -v "$program" >/dev/null || return 0
    done
    return 1
}

install_packages() {
    command -v apt-get >/dev/null || cannot "SLURM is not installed, and there is no apt-get to install it with"
    # Debian's packages start their services when installed, unless this file says no.
    local policy=/usr/sbin/policy-rc.d made=
    [ -e $policy ] || { made=$policy && printf '#!/bin/sh\nexit 101\n' >$policy && chmod 755 $policy; }
    mkdir -p "$dir"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        slurmctld slurmd slurm-client munge iproute2 procps; } >"$dir/apt.log" 2>&1 || true
    [ -z "$made" ] || rm "$made"
    ! programs_missing || cannot "apt-get could not install SLURM: $(tail -n 1 "$dir/apt.log")"
}

write_configuration() {
    local i
    "$here/configuration.sh" "$dir" "$network" "$nodes" >"$dir/etc/slurm.conf"
    echo "Name=gpu Type=h100 File=$dir/dev/nvidia[0-7]" >"$dir/etc/gres.conf"
    {
        echo "127.0.0.1 localhost"
        echo "$network.254 login"
        echo "$network.253 controller"
        for ((i = 1; i <= nodes; i++)); do echo "$network.$i node$i"; done
    } >"$dir/etc/hosts"
    # Without dns: there is no route to any, and every failed look-up of torch's would wait 5 s for one.
    { sed '/^hosts:/d' /etc/nsswitch.conf && echo "hosts: files"; } >"$dir/etc/nsswitch.conf"
}

# Plugs a cable between the bridge and machine $1, whose last number in the network is $2.
plug() {
    local card=$bridge.$2
    ip link del "$card" 2>/dev/null || true
    ip link add "$card" type veth peer name eth0 netns "$(running "$1")"
    ip link set "$card" master "$bridge" up
}

# boot NAME NUMBER DAEMON...
boot() {
    local name=$1 number=$2 outer
    shift 2
    setsid unshare --net --uts --mount --pid --fork --mount-proc --kill-child \
        "$here/machine.sh" "$name" "$network.$number" "$dir" "$@" >>"$dir/log/$name.out" 2>&1 </dev/null &
    outer=$!
    within 10 pgrep --parent "$outer" || cannot "namespaces: $(tail -n 1 "$dir/log/$name.out")"
    record "$name" "$(pgrep --parent "$outer")"
    plug "$name" "$number"
}

# A node's slurmd has answered since second $2. Until then the controller shows what the node was before.
registered() {
    local start
    start=$(scontrol show node "$1" | sed -n 's/.*SlurmdStartTime=\([^ ]*\).*/\1/p')
    [[ $start == 20* ]] && [ "$(date -d "$start" +%s)" -ge "$2" ]
}

# Every node answers and takes jobs; one that is back but shut, for having been away or by a person, is opened.
ready() {
    local states
    states=$(sinfo --noheader --Node --partition gpu --format '%N %T')
    while read -r node; do
        scontrol update NodeName="$node" State=RESUME || true
    done < <(sed -nE 's/ (down|drained|draining|fail)$//p' <<<"$states")
    ! grep -E '\*| (down|drain|fail|unk)' <<<"$states"
}

! programs_missing || install_packages
unshare --net --uts --mount --pid --fork --mount-proc sh -c \
    'hostname probe && ip link add probe type bridge && ip link add card type veth peer name plug' 2>/dev/null ||
    cannot "it needs CAP_SYS_ADMIN and CAP_NET_ADMIN, for namespaces and a network bridge"
[ "${FRESH:-0}" = 0 ] || { SLURM_TEST_DIR=$dir "$here/down.sh" && rm -rf "$dir"; }
mkdir -p "$dir"/{dev,etc,log,munge,pid,spool,state}
# munged refuses a folder that others can write to.
chmod 755 "$dir" "$dir"/*/
write_configuration
for i in {0..7}; do
    # Clones of /dev/null: SLURM wants character devices whose names end in their numbers, and never opens them.
    [ -c "$dir/dev/nvidia$i" ] || mknod -m 666 "$dir/dev/nvidia$i" c 1 3 || cannot "it needs CAP_MKNOD, for fake GPUs"
done

if ! running munged >/dev/null; then
    rm -f "$dir"/munge/*
    head -c 128 /dev/urandom >"$dir/munge/key"
    chmod 400 "$dir/munge/key"
    setsid munged --foreground --socket "$dir/munge/socket" --key-file "$dir/munge/key" --pid-file "$dir/munge/pid" \
        --seed-file "$dir/munge/seed" --log-file "$dir/log/munged.log" >>"$dir/log/munged.out" 2>&1 </dev/null &
    record munged $!
    within 10 test -S "$dir/munge/socket" || { tail "$dir"/log/munged.* >&2 && exit 1; }
fi

if ! ip link show "$bridge" >/dev/null 2>&1; then
    ip link add "$bridge" type bridge
    ip addr add "$network.254/24" dev "$bridge"
    ip link set "$bridge" up
fi

if ! running controller >/dev/null; then
    boot controller 253 slurmctld -D
    within 30 sh -c 'scontrol ping | grep -q "is UP"' || { tail "$dir"/log/{controller.out,slurmctld.log} >&2 && exit 1; }
fi

declare -A booted=()
for ((i = 1; i <= nodes; i++)); do
    node=node$i
    if ! running "$node" >/dev/null; then
        # SLURM takes a node for rebooted only if that was later, in whole seconds, than its last answer.
        [ ! -e "$dir/pid/$node" ] || sleep 2
        booted[$node]=$(date +%s)
        # -b: "I was rebooted", so that SLURM ends what ran here before. The kernel's boot time is not this node's.
        boot "$node" "$i" slurmd -D -b -N "$node"
    elif ! nsenter -t "$(running "$node")" --pid --mount pgrep -x slurmd >/dev/null; then
        booted[$node]=$(date +%s)
        setsid "$here/node.sh" exec "$node" slurmd -D -N "$node" >>"$dir/log/$node.out" 2>&1 </dev/null &
    fi
done
for node in "${!booted[@]}"; do
    within 30 registered "$node" "${booted[$node]}" ||
        { echo "$node did not come up:" && tail "$dir/log/$node.out" "$dir/log/slurmd.$node.log" && exit 1; } >&2
done
within 60 ready || {
    ready >&2 || true
    exit 1
}
