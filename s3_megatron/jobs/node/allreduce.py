"""How fast the nodes talk to each other, and which one is slow: ``torchrun ... -m s3_megatron.jobs.node.allreduce``.

The bus bandwidth of an all-reduce of S bytes over n ranks in t seconds is S / t * 2 (n - 1) / n bytes a second: what
every rank must send and receive at least, as NVIDIA's nccl-tests count it. GB are 10**9 bytes.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from s3_megatron.jobs.node import verdict
from s3_megatron.machine import node_name
from s3_megatron.run_folder import RunFolder

_MIB = 2**20
_REPEATS = 5
Pair = tuple[int, int]


def main() -> None:
    """Measure, print, and exit with 3 where a node is to be excluded (RUN/attempts/ID/bad_nodes names it)."""
    parser = argparse.ArgumentParser(prog="s3_megatron.jobs.node.allreduce", allow_abbrev=False)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--attempt", required=True, help="the attempt's folder in RUN/attempts")
    parser.add_argument("--floor-gbps", type=float, required=True, help="least bus bandwidth between nodes, in GB/s")
    parser.add_argument("--max-clock-skew", type=float, required=True, help="from the median of all nodes, in seconds")
    parser.add_argument("--cpu", action="store_true", help="a rehearsal: gloo, and small messages")
    args = parser.parse_args()
    device = torch.device("cpu")
    if not args.cpu:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # Not for ever: a link that is dead altogether must end the job, not hang it.
    dist.init_process_group("gloo" if args.cpu else "nccl", timeout=timedelta(minutes=5))
    try:
        bad = _measure(args, device)
    finally:
        dist.destroy_process_group()
    sys.exit(verdict.BAD_NODES if bad else 0)


def _measure(args: argparse.Namespace, device: torch.device) -> dict[str, str]:
    """Measure and print; returns why each bad node is bad, by its name, on every rank."""
    if dist.get_world_size() == 1:
        # No link to measure; that the library starts and works on this GPU is seen all the same.
        data = torch.ones(_MIB, device=device)
        dist.all_reduce(data)
        if float(data.mean()) != 1:
            raise RuntimeError(f"an all-reduce of ones over one rank gives {float(data.mean())}")
        print(f"all-reduce: one rank: {dist.get_backend()} works, no link was measured", flush=True)
        return {}
    data = torch.zeros((8 if args.cpu else 256) * _MIB // 4, device=device)
    nodes, clocks = _gather_nodes()
    overall = bandwidth(data, None, range(dist.get_world_size()))
    pairs = _measure_pairs(data, nodes)
    names = list(nodes)
    bad = skewed_clocks(dict(zip(names, clocks, strict=True)), args.max_clock_skew)
    for node, reason in slow_nodes(pairs, overall, len(nodes), args.floor_gbps).items():
        bad[names[node]] = "; ".join(filter(None, (bad.get(names[node]), reason)))
    if dist.get_rank() == 0:
        size = f"{data.nbytes // _MIB} MiB"
        print(f"all-reduce: {overall:.2f} GB/s over {dist.get_world_size()} ranks, {size}", flush=True)
        for (one, other), speed in pairs.items():
            print(f"all-reduce: {speed:.2f} GB/s  {names[one]} - {names[other]}", flush=True)
        if overall < args.floor_gbps and not bad:
            print(f"all-reduce: below the floor of {args.floor_gbps:g} GB/s, but no node alone is: the network is")
        for name, reason in bad.items():
            print(f"all-reduce: {name} is bad: {reason}", flush=True)
            RunFolder(args.run_dir).attempt(args.attempt).report_bad_node(name, reason)
    return bad


@dataclass(frozen=True)
class _Here:
    """What a rank knows of its node."""

    name: str
    clock: float


def _gather_nodes() -> tuple[dict[str, list[int]], list[float]]:
    """Gather each node's ranks, by its name, and its clock in seconds right after a barrier."""
    dist.barrier()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    mine = _Here(node_name(), time.time())
    gathered: list[_Here] = [mine] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    nodes: dict[str, list[int]] = {}
    for rank, here in enumerate(gathered):
        nodes.setdefault(here.name, []).append(rank)
    # The first to look: a rank may have been kept from running for a moment.
    return nodes, [min(gathered[rank].clock for rank in ranks) for ranks in nodes.values()]


def _measure_pairs(data: torch.Tensor, nodes: Mapping[str, Sequence[int]]) -> dict[Pair, float]:
    """Measure neighbouring nodes two by two, all pairs of a phase at the same time."""
    ranks, found = list(nodes.values()), {}
    for phase in phases(len(nodes)):
        groups = {(one, other): [*ranks[one], *ranks[other]] for one, other in phase}
        made = {pair: dist.new_group(members) for pair, members in groups.items()}  # every rank makes every group
        mine = {pair: bandwidth(data, made[pair], groups[pair]) for pair in phase if dist.get_rank() in groups[pair]}
        gathered: list[dict[Pair, float]] = [{}] * dist.get_world_size()
        dist.all_gather_object(gathered, mine)
        for part in gathered:
            found.update(part)
        for pair in mine:
            dist.destroy_process_group(made[pair])
    return found


def phases(count: int) -> list[list[Pair]]:
    """Pair ``count`` nodes with both neighbours in a ring, so that no node is in two pairs of a phase."""
    if count <= 2:
        return [[(0, 1)]] * (count - 1)
    ring = [(node, (node + 1) % count) for node in range(count)]
    whole = count - count % 2
    return [ring[0:whole:2], ring[1:whole:2], *([ring[whole:]] if count % 2 else [])]


def bandwidth(data: torch.Tensor, group: dist.ProcessGroup | None, members: Sequence[int]) -> float:
    """Give the bus bandwidth in GB/s of an all-reduce of ``data``, in place, in ``group`` with ranks ``members``."""
    seconds = []
    for _ in range(1 + _REPEATS):
        dist.barrier(group)
        started = time.perf_counter()
        dist.all_reduce(data, group=group)
        if data.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    # Without the first, which connects. The median: one slow repetition is other traffic.
    slowest = torch.tensor(statistics.median(seconds[1:]), device=data.device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX, group=group)
    return data.nbytes / slowest.item() * 2 * (len(members) - 1) / len(members) / 1e9


def slow_nodes(pairs: Mapping[Pair, float], overall: float, count: int, floor: float) -> dict[int, str]:
    """Name the nodes all of whose pairs are slower than ``floor``, by their number: not the slow one's neighbours.

    Of two nodes both are: which one is slow cannot be seen. A single one is named for its own ranks (``overall``).
    """
    if count == 1:
        return {0: f"{overall:.2f} GB/s within the node, {floor:g} wanted"} if overall < floor else {}
    slow = {}
    for node in range(count):
        speeds = [speed for pair, speed in pairs.items() if node in pair]
        if max(speeds) < floor:
            slow[node] = f"at most {max(speeds):.2f} GB/s to its neighbours, {floor:g} wanted"
    return slow


def skewed_clocks(clocks: Mapping[str, float], limit: float) -> dict[str, str]:
    """Name the nodes whose clock is more than ``limit`` seconds from the median of all."""
    middle = statistics.median(clocks.values())
    return {
        name: f"its clock is {clock - middle:+.1f} s from the other nodes', at most {limit:g} wanted"
        for name, clock in clocks.items()
        if abs(clock - middle) > limit
    }


if __name__ == "__main__":
    main()
