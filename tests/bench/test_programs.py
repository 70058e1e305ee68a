"""The other programs of `s3-megatron bench`, run small; those of the hosts are steps of the visit's dry run."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from s3_megatron import cli
from s3_megatron.bench import kernel_instructions, rehearsal_products, softmuon_step
from s3_megatron.errors import S3Error
from tests.launcher import settings
from tests.terminal import run_main


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def printed(*words: str) -> str:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, ["bench", *words])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_softmuons_map(tmp_path: Path) -> None:
    """docs/softmuon.md's table, small: enough steps in float32 are close to the exact map."""
    target = tmp_path / "map.json"
    shown = printed("softmuon-map", "--columns", "16", "--json", str(target))
    written = json.loads(target.read_text())
    assert "a soft phase of Gaussian matrices" in shown
    assert "half 1, half 1e-4" in {row["spectrum"] for row in written["errors"]}
    assert written["columns"] == 16 and written["versions"]["emerging-optimizers"] and written["processor"]
    # 8 steps reach a singular value of 1e-3; tau 1 leaves those below it near 0, so the rest is float32's rounding.
    assert [row["fp32, 8 steps"] < 1e-3 for row in written["errors"] if row["tau"] == 1.0] == [True] * 5
    assert list(tmp_path.iterdir()) == [target]


def test_softmuons_step(tmp_path: Path) -> None:
    target = tmp_path / "step.json"
    shown = printed("softmuon-step", "--width", "8", "--layers", "1", "--rounds", "2", "--json", str(target))
    written = json.loads(target.read_text())
    rows = {row["name"]: row for row in written["rows"]}
    assert rows["Muon, torch"]["ratio"] == 1 and all(row["ms"] > 0 and name in shown for name, row in rows.items())
    # The temperature falls, and with it the steps of the iteration.
    plans = [int(row["plan"].partition(",")[0]) for name, row in rows.items() if "soft," in name]
    assert plans == sorted(plans, reverse=True) and plans[0] == 20 > plans[-1]
    assert rows["SoftMuon, hard"]["plan"] == "5, medium"
    assert written["parameters"] == 12 * 8 * 8 and written["versions"]["emerging-optimizers"]
    with pytest.raises(S3Error, match="--device is tpu: it must be cpu"):
        softmuon_step.measure(8, 1, 1, "tpu")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ptrace is Linux'")
def test_instructions_of_the_kernels_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """It took a function of bench/step.py that had another name. An element of a portable loop takes more than one."""
    monkeypatch.setattr(kernel_instructions, "POWERS", (3.0,))
    monkeypatch.setattr(kernel_instructions, "FORMATS", {"float32": kernel_instructions.FORMATS["float32"]})
    monkeypatch.setattr(kernel_instructions, "ROUNDS", 1)
    monkeypatch.setattr(kernel_instructions, "ELEMENTS", 64)
    monkeypatch.setattr(kernel_instructions, "ceilings", lambda device, rounds: (30e9, 20e9))
    try:
        measured: dict[str, Any] = kernel_instructions.measure()
    except S3Error as error:
        # A processor, or a container, that counts nothing; whatever else is refused is a fault.
        if not str(error).startswith("instructions are counted"):
            raise
        pytest.skip(str(error))
    found = {(row["loop"], row["states"]): row["instructions"] for row in measured["rows"]}
    assert found and min(found.values()) > 1
    (table,) = kernel_instructions.tables(measured)
    assert table.row_count == len(found)


def test_the_rehearsals_products_are_a_table_with_the_limits_of_the_cpu() -> None:
    measured = {"processor": "a CPU", "limits": {"ATEN_CPU_CAPABILITY": "avx2"}, "dropout": 0.1}
    (table,) = rehearsal_products.tables({**measured, "results": {"float32": 50.0, "bf16": 75.0}})
    assert "a CPU" in str(table.title) and "ATEN_CPU_CAPABILITY=avx2" in str(table.title)
    assert list(table.columns[2].cells) == ["1.00", "1.50"]


def test_what_is_missing_is_named_with_what_installs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    assert run_main(monkeypatch, "bench", "deepspeed-step") == 2
    assert "this needs deepspeed: pip install 's3-megatron[deepspeed]'" in capsys.readouterr().err


@pytest.mark.slow
def test_no_program_replaces_anything_when_it_is_imported() -> None:
    """They turned the rehearsal on, and installed S3 in Megatron, as they were imported."""
    code = "import pkgutil, sys, torch; from s3_megatron import bench; available = torch.cuda.is_available; "
    code += "[__import__(f'{bench.__name__}.{one.name}') for one in pkgutil.iter_modules(bench.__path__)]; "
    code += "assert torch.cuda.is_available is available and not {'megatron', 'deepspeed'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], env=settings(None), check=True, timeout=250)
