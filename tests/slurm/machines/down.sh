#!/usr/bin/env bash
# End the cluster of up.sh: every process that up.sh recorded, and no other. Jobs, logs and settings stay in the folder.
set -euo pipefail
# shellcheck source=tests/slurm/machines/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

for file in "$dir"/pid/node? "$dir"/pid/node?? "$dir"/pid/controller "$dir"/pid/munged; do
    [ -e "$file" ] || continue
    power_off "${file##*/}"
    rm "$file"
done
ip link del "$bridge" 2>/dev/null || true
