"""`s3-megatron bench`, which prints the figures: run small, and its arithmetic checked on made-up times."""

import json
from dataclasses import asdict

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.gpu import report
from s3_megatron import cli
from s3_megatron.bench import step as bench
from s3_megatron.bench import timing
from s3_megatron.bench.contenders import ADAMW
from s3_megatron.bench.timing import Times


@pytest.mark.slow
def test_every_contender_takes_its_steps_and_is_compared_with_fused_adamw(tmp_path):
    target = tmp_path / "step.json"
    command = ["bench", "step", "--parameters", "20011", "--threads", "1", "--repeats", "2", "--json", str(target)]
    threads = torch.get_num_threads()
    try:
        result = CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, command)
    finally:
        torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    written = json.loads(target.read_text())
    rows = {(row["tensors"], row["name"]): row for row in written["rows"]}
    for tensors in (1, 1000):
        assert rows[tensors, ADAMW]["ratio"] == 1
        names = [name for count, name in rows if count == tensors]
        assert {"S3 p=3", "S3 p=3, bf16 states", "S3 p=3, foreach"} < set(names)
        for name in names:
            assert rows[tensors, name]["ms"] > 0 and name in result.stdout
    host = {(row["tensors"], row["name"]): row["ms"] for row in written["host"]}
    assert {tensors for tensors, _ in host} == {1, 1000, 10_000} and {name for _, name in host} == {"S3 p=3", ADAMW}
    assert all(ms > 0 for ms in host.values()) and "host time of a step" in result.stdout
    assert written["stream"] > 0 and written["machine"]["threads"] == 1
    assert written["machine"]["versions"]["torch"] == torch.__version__.partition("+")[0]
    # Nothing is left beside the file.
    assert list(tmp_path.iterdir()) == [target]


def test_bandwidth_and_ratios_are_computed_from_the_median():
    """10^9 parameters at 28 bytes in 2 s are 14 GB/s: a quarter of a stream of 56, and half of an AdamW of 4 s."""
    contender = bench.Contender("S3", lambda params: None, 28)
    result = bench.Result({}, 56.0, 28.0, [], [], [])
    taken = timing.median([Times(2.0), Times(1.0), Times(9.0)])
    row = bench._row(contender, 10**9, 1, taken, Times(4.0), result, threads=2)
    assert (row.ms, row.bandwidth, row.share_of_stream, row.ratio) == (2000, 14, 0.25, 0.5)
    assert (row.share_of_copy, row.kernel_ms, row.graph_ms) == (0.5, None, None)
    # 28 GB at 16 GB/s take 1.75 s: at 8 GB/s a core the same step is bound by its own 2 s.
    assert row.ms_at_slow_cores == 2000
    assert bench._row(contender, 10**9, 1, Times(1.0), Times(4.0), result, threads=2).ms_at_slow_cores == 1750
    # On a GPU the bandwidth is its own, whatever Python takes beside it.
    row = bench._row(contender, 10**9, 1, Times(2.0, 1.0), Times(4.0, 0.5), result, threads=2, graph=1.5)
    assert (row.bandwidth, row.ratio, row.kernel_ms, row.kernel_ratio, row.graph_ms) == (28, 0.5, 1000, 2, 1500)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_without_fused_adamw_there_is_no_ratio_to_it(device: str) -> None:
    """Where it did not run, as for want of memory, each contender was compared with itself: 1.00 for all."""
    result = bench.Result({}, 56.0, 28.0, [], [], [])
    row = bench._row(bench.Contender("S3", lambda params: None, 28), 10**9, 1, Times(2.0, 1.0), None, result, threads=2)
    assert (row.ratio, row.kernel_ratio) == (None, None)
    cells = bench._cells(row, device)
    assert {cells[name] for name in ("x AdamW", "kernel x") if name in cells} == {"-"}
    as_stored = {"figures": {"copy": 28.0, "rows": [asdict(row)]}}
    assert list(report.summary("bench", as_stored))[1:] == ["S3, 1,000,000,000 in 1: 2000.00 ms, 100% of the copy, -"]


def test_shards_cover_the_parameters_once_and_are_of_odd_sizes():
    params = bench._parameters(100_003, 1000, "cpu")
    assert sum(param.numel() for param in params) == 100_003 and len({param.numel() for param in params}) > 50
    addresses = [param.data_ptr() for param in params]
    assert addresses == sorted(addresses) and min(param.numel() for param in params) > 0
    assert not [address for address in addresses if (address - addresses[0]) % (64 * 4)]
    assert all(param.grad.shape == param.shape and not torch.equal(param.grad, param) for param in params)
    assert bench._parameters(7, 1, "cpu")[0].numel() == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "tpu"], "cpu or cuda"),
        (["--parameters", "1000"], "more than 1000"),
        (["--repeats", "0"], "repeats"),
        (["--threads", "0"], "threads"),  # it took all cores
        (["--threads", "-2"], "threads"),  # a traceback out of torch
    ],
)
def test_what_cannot_be_measured_is_refused(options, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["s3-megatron", "bench", "step", *options])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells a machine without a GPU what it can do instead")
def test_without_a_gpu_cuda_is_refused_with_what_can_be_had(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["s3-megatron", "bench", "step", "--device", "cuda"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "s3-megatron bench triton" in capsys.readouterr().err
