"""The all-reduce before a job: who is slow, whose clock is wrong."""

import sys
from pathlib import Path

import pytest

from s3_megatron.jobs.node import allreduce
from tests.launcher import torchrun
from tests.ranks import ranks


@pytest.mark.parametrize("count", range(1, 10))
def test_every_node_meets_both_neighbours_and_is_in_one_pair_at_a_time(count: int) -> None:
    met = {frozenset(pair) for phase in allreduce.phases(count) for pair in phase}
    assert met == {frozenset((node, (node + 1) % count)) for node in range(count) if count > 1}
    for phase in allreduce.phases(count):
        nodes = [node for pair in phase for node in pair]
        assert len(nodes) == len(set(nodes)) > 0


@pytest.mark.parametrize("count", range(3, 9))
def test_a_slow_node_is_named_and_its_neighbours_are_not(count: int) -> None:
    for slow in range(count):
        pairs = {pair: 1.0 if slow in pair else 100.0 for phase in allreduce.phases(count) for pair in phase}
        named = allreduce.slow_nodes(pairs, 1.0, count, floor=50)
        assert list(named) == [slow]
        assert named[slow] == "at most 1.00 GB/s to its neighbours, 50 wanted"


def test_of_two_nodes_both_are_named_and_one_for_itself() -> None:
    assert list(allreduce.slow_nodes({(0, 1): 1.0}, 1.0, 2, floor=50)) == [0, 1]
    assert list(allreduce.slow_nodes({}, 1.0, 1, floor=50)) == [0]
    assert allreduce.slow_nodes({(0, 1): 50.0}, 50.0, 2, floor=50) == {}


def test_a_clock_far_from_the_others_is_named() -> None:
    assert allreduce.skewed_clocks({"a": 100.0, "b": 100.5, "c": 90.0}, limit=5) == {
        "c": "its clock is -10.0 s from the other nodes', at most 5 wanted"
    }


# Two ranks of one machine that say that they are two nodes; the second's clock is a minute slow.
NODES = """
import os, runpy, sys, time
os.environ["SLURMD_NODENAME"] = "node" + os.environ["RANK"]
name, clocks = sys.argv.pop(1), sys.argv.pop(1)
if clocks == "skewed" and os.environ["RANK"] == "1":
    clock = time.time
    time.time = lambda: clock() - 60
runpy.run_module(name, run_name="__main__", alter_sys=True)  # as -m does
"""


@pytest.mark.distributed
def test_two_nodes_are_measured(tmp_path: Path) -> None:
    """The second time by the old name, which scripts that were queued before the move have: what ranks send each other
    is pickled as of ``__main__``, which an alias must be, too."""
    (tmp_path / "nodes.py").write_text(NODES)
    flags = ["--cpu", "--run-dir", str(tmp_path), "--attempt", "5-0", "--max-clock-skew", "40"]
    good = ranks(
        [str(tmp_path / "nodes.py"), "s3_megatron.jobs.node.allreduce", "right", *flags, "--floor-gbps", "0.001"],
        nproc=2,
        timeout=250,
    )
    assert good.returncode == 0, good.stderr[-3000:]
    assert "GB/s over 2 ranks, 8 MiB" in good.stdout and "GB/s  node0 - node1" in good.stdout
    assert not (tmp_path / "attempts").exists()

    # Which of two clocks is right is unknown: both are as far from the median.
    flags = [*flags[:-1], "20", "--floor-gbps", "1e6"]
    bad = torchrun([str(tmp_path / "nodes.py"), "s3_megatron.train.allreduce", "skewed", *flags], nproc=2, timeout=250)
    assert bad.returncode == 1 and "exitcode  : 3" in bad.stderr, bad.stderr[-3000:]
    lines = (tmp_path / "attempts/5-0/bad_nodes").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == ["node0", "node1"]
    assert all("GB/s to its neighbours, 1e+06 wanted" in line and "its clock is" in line for line in lines)


def test_one_rank_reduces_and_says_that_no_link_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "0")):
        monkeypatch.setenv(name, value)
    flags = ["--cpu", "--run-dir", str(tmp_path), "--attempt", "5-0", "--max-clock-skew", "5", "--floor-gbps", "9"]
    monkeypatch.setattr(sys, "argv", ["allreduce", *flags])
    with pytest.raises(SystemExit) as stop:
        allreduce.main()
    assert stop.value.code == 0
    assert "one rank: gloo works, no link was measured" in capsys.readouterr().out
