#!/usr/bin/env bash
# Sourced by up.sh, down.sh and node.sh: where the cluster lives, and which of its processes still run.
# shellcheck disable=SC2034 # Not every script needs every name.

dir=${SLURM_TEST_DIR:-/var/tmp/s3-slurm}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# A folder has its own network, so clusters of two checkouts live side by side.
number=$(($(cksum <<<"$dir" | cut -d' ' -f1) % 250 + 1))
bridge=s3slurm$number
network=10.78.$number
export SLURM_CONF=$dir/etc/slurm.conf

# cannot REASON: this machine cannot carry the cluster; 69 is EX_UNAVAILABLE of sysexits.h.
cannot() {
    echo "no SLURM cluster here: $1" >&2
    exit 69
}

# When process $1 started, in ticks; nothing if there is none. A zombie is none: whoever should reap it may never do.
started() {
    sed 's/^.*) //' "/proc/$1/stat" 2>/dev/null | awk '$1 != "Z" { print $20 }'
}

record() { # NAME PID
    echo "$2 $(started "$2")" >"$dir/pid/$1"
}

# Print the pid recorded as $1 if that very process runs: the start time tells it from a later one with its number.
running() {
    local pid ticks
    [ -s "$dir/pid/$1" ] || return 1
    read -r pid ticks <"$dir/pid/$1"
    [ -n "$ticks" ] && [ "$(started "$pid")" = "$ticks" ] && echo "$pid"
}

within() { # SECONDS COMMAND...
    local end=$((SECONDS + $1))
    until "${@:2}" >/dev/null 2>&1; do
        [ "$SECONDS" -lt "$end" ] || return 1
        sleep 0.05
    done
}

gone() { # NAME
    ! running "$1"
}

# Kill what is recorded as $1. It is the first process of a machine's namespaces: all others there go with it.
power_off() {
    local pid
    pid=$(running "$1") || return 0
    kill -KILL "$pid"
    within 10 gone "$1"
}
