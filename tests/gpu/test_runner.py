"""``make gpu``'s own parts, on made-up steps: limits, what is skipped and why, what is written, wheels."""

import json
import os
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.gpu import __main__ as visit
from benchmarks.gpu import card, page, report, runner, steps, wheels
from benchmarks.gpu.runner import FAILED, LATE, PASSED, SKIPPED, Outcome, Step
from tests.launcher import ROOT


def program(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def ran(
    folder: Path, made: list[Step], seconds: float = 60, reasons: dict[str, str] | None = None
) -> dict[str, Outcome]:
    seen: list[Outcome] = []
    deadline = time.monotonic() + seconds
    outcomes = runner.run(made, folder, os.environ, deadline, lambda step: (reasons or {}).get(step.name), seen.append)
    assert outcomes == seen, "each is shown as soon as it ends"
    return {outcome.step.name: outcome for outcome in outcomes}


def test_no_step_stops_the_next_and_none_outlives_its_limit(tmp_path: Path) -> None:
    """A rank of torchrun is in a session of its own, which ending a process group does not reach."""
    sleeper = "import subprocess, sys, time; print('so far', flush=True); subprocess.Popen([sys.executable, '-c', "
    sleeper += "'import time; time.sleep(600)'], start_new_session=True); time.sleep(600)"
    made = [
        Step("fails", 1, 30, program("print('one'); raise SystemExit(3)")),
        Step("hangs", 1, 2, program(sleeper)),
        Step("absent", 2, 30, ["true"]),
        Step("works", 2, 30, program(f"import os; open(os.environ['{runner.NUMBERS}'], 'w').write('[7]')")),
    ]
    found = ran(tmp_path, made, reasons={"absent": "ncu is not on the PATH"})
    assert {name: one.state for name, one in found.items()} == {
        "fails": FAILED, "hangs": LATE, "absent": SKIPPED, "works": PASSED,
    }  # fmt: skip
    assert found["fails"].reason == "exit code 3: one" and found["absent"].reason == "ncu is not on the PATH"
    assert found["hangs"].reason.startswith("stopped after 2 s") and "so far" in (tmp_path / "hangs.log").read_text()
    assert (tmp_path / "works.json").read_text() == "[7]"
    assert not [one for one in psutil.process_iter() if runner._belongs(one, "") or _is_marked(one, "hangs-")]


def _is_marked(process: psutil.Process, beginning: str) -> bool:
    try:
        return process.environ().get(runner.MARK, "").startswith(beginning)
    except psutil.Error:
        return False


def test_the_whole_ends_in_time_and_names_what_had_none(tmp_path: Path) -> None:
    made = [Step("long", 1, 600, program("import time; time.sleep(600)")), Step("last", 2, 600, ["true"])]
    started = time.monotonic()
    found = ran(tmp_path, made, seconds=7)
    assert time.monotonic() - started < 7 + runner._GRACE_SECONDS
    assert (found["long"].state, found["last"].state, found["last"].reason) == (LATE, SKIPPED, "no time is left")


def test_why_a_step_cannot_run_is_one_line() -> None:
    good = {"obstacle": None, "free_gib": 70.0}
    step = Step("s", 1, 1, ["true"], modules=("deepspeed",), programs=("no-such-program",), gib=60)
    wanted = {"deepspeed": "deepspeed is neither installed nor in .whl/: make gpu-wheels"}
    assert visit._obstacle(step, good | {"obstacle": "no GPU: torch sees none"}, wanted) == "no GPU: torch sees none"
    assert visit._obstacle(step, good, wanted) == wanted["deepspeed"]
    assert visit._obstacle(step, good, {}) == "no-such-program is not on the PATH"
    small = Step("s", 1, 1, ["true"], gib=71)
    assert visit._obstacle(small, good, {}) == "70 GiB of the GPU's memory are free, and it needs 71"
    assert visit._obstacle(Step("s", 1, 1, ["true"], gpu=False, gib=99), {"obstacle": "no GPU"}, {}) is None


def test_what_is_wrong_with_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU here: torch's answers are made up, one wrong thing at a time."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(card.shutil, "which", lambda name: None)
    assert card.look()["obstacle"] == "no GPU: torch sees none, and nvidia-smi is not here"
    monkeypatch.setattr(card.shutil, "which", lambda name: "/usr/bin/nvidia-smi")

    def old_driver() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12020).\nPlease update")

    monkeypatch.setattr(torch.cuda, "init", old_driver)
    assert "driver on your system is too old (found version 12020)" in card.look()["obstacle"]
    assert "\n" not in card.look()["obstacle"]
    # torch sees one, which is too old for Triton, or for this torch.
    properties = type("P", (), {"name": "Tesla T4", "major": 7, "minor": 5, "multi_processor_count": 40})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (14 * 2**30, 15 * 2**30))
    real = torch.ones
    monkeypatch.setattr(torch, "ones", lambda size, device: real(size))
    assert card.look()["obstacle"] == "Tesla T4 has compute capability 7.5, and Triton supports 8.0 and later"

    def no_image(size: int, device: str) -> None:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nand more")

    monkeypatch.setattr(torch, "ones", no_image)
    wanted = "Tesla T4 does not run torch: CUDA error: no kernel image is available for execution on the device"
    assert card.look()["obstacle"] == wanted


def test_a_visit_without_a_gpu_names_every_step(tmp_path: Path) -> None:
    """Exit code 1, the reason in every row; what was found is written all the same, though nobody reads the output."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--minutes", "2", "--out", str(tmp_path / "out")]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    shown = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=110)
    assert shown.returncode == 1, shown.stderr[-2000:]
    found = json.loads((tmp_path / "out/gpu.json").read_text())
    assert list(found["steps"]) == [step.name for step in steps.steps(tmp_path, dry=False)]
    assert {step["state"] for step in found["steps"].values()} == {SKIPPED}
    reason = found["card"]["obstacle"]
    assert "GPU" in reason and all(step["reason"] == reason for step in found["steps"].values())
    assert shown.stdout.count("skipped") >= 2 * len(found["steps"]) and "Traceback" not in shown.stderr


def test_the_rehearsal_has_every_step_but_the_profiler(tmp_path: Path) -> None:
    """Programs and their options are the same, so that none meets its first run on the card."""
    real, dry = ({step.name: step for step in steps.steps(tmp_path, dry=dry)} for dry in (False, True))
    assert set(real) - set(dry) == {"ncu"} and set(dry) < set(real)
    for name, step in dry.items():
        modules = [words[words.index("-m") + 1] for words in (step.command, real[name].command) if "-m" in words]
        assert len(set(modules)) <= 1, name
        assert not step.gpu
    assert [step.stage for step in real.values()] == sorted(step.stage for step in real.values())


def test_figures_table_and_archive(tmp_path: Path) -> None:
    junit = '<testsuites><testsuite><testcase name="a"><properties><property name="resume" value="equal to the bit"/>'
    junit += '</properties></testcase><testcase name="b"><failure/></testcase><testcase name="c"><skipped/></testcase>'
    (tmp_path / "engines.xml").write_text(junit + "</testsuite></testsuites>")
    row = {"case": "fp32", "variant": "as it is", "ms": 9.31, "gbps": 2800, "of_copy": 0.93}
    (tmp_path / "variants.json").write_text(json.dumps({"elements": 10**9, "copy_gbps": 3000, "rows": [row]}))
    (tmp_path / "ncu.log").write_bytes(b"x" * (report._MOST_LOG_BYTES + 5) + b"end")
    made = [Step(name, 1, 1, ["true"]) for name in ("engines", "variants", "ncu")]
    outcomes = [Outcome(made[0], FAILED, 3.0, "exit code 1: [b]"), Outcome(made[1], PASSED, 2.0)]
    found = report.figures([*outcomes, Outcome(made[2], PASSED, 1.0)], tmp_path, {"name": "H100"}, "python -m x")
    assert found["steps"]["engines"]["tests"]["failures"] == ["b"]
    lines = [
        *report.summary("engines", found["steps"]["engines"]),
        *report.summary("variants", found["steps"]["variants"]),
    ]
    assert lines == [
        "exit code 1: [b]",
        "1 passed, 1 failed, 1 skipped",
        "failed: b",
        "resume equal to the bit",
        "copy 3000 GB/s over 1,000,000,000 weights",
        "fp32, as it is: 9.31 ms, 2800 GB/s, 93.0%",
    ]
    assert report.table(found).row_count == 3
    report.archive(tmp_path, tmp_path / "logs.tgz")
    with tarfile.open(tmp_path / "logs.tgz") as tar:
        assert sorted(tar.getnames()) == ["engines.xml", "ncu.log"]
        content = tar.extractfile("ncu.log")
        assert content is not None and content.read()[-4:] == b"xend"


def test_wheels_are_pinned_repacked_and_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = wheels.pinned((ROOT / "constraints.txt").read_text())
    assert set(pinned) == set(wheels.CARRIED)
    with pytest.raises(KeyError):
        wheels.pinned("torch==2.13.0\n")
    wheel = tmp_path / "bitsandbytes-1-py3-none-any.whl"
    kept = ["bitsandbytes/libbitsandbytes_cuda130.so", "bitsandbytes/libbitsandbytes_cpu.so", "bitsandbytes/a.py"]
    other, record = "bitsandbytes/libbitsandbytes_cuda121.so", "bitsandbytes-1.dist-info/RECORD"
    with zipfile.ZipFile(wheel, "w") as made:
        for name in (*kept, other):
            made.writestr(name, name)
        made.writestr(record, "".join(f"{name},,\n" for name in (*kept, other, record)))
    wheels.repack(wheel)
    with zipfile.ZipFile(wheel) as repacked:
        assert repacked.namelist() == [*kept, record] and other not in repacked.read(record).decode()
    assert [path.name for path in tmp_path.iterdir()] == [wheel.name]

    monkeypatch.setattr(wheels, "_installed", lambda module: module not in ("bitsandbytes", "pydantic_core", "torchao"))
    (tmp_path / "pydantic_core-2.50.4-cp311-cp311-manylinux_2_17_x86_64.whl").touch()
    missing: dict[str, Any] = wheels.obstacles(tmp_path)
    assert list(missing) == ["pydantic_core", "torchao"]
    assert "is for another Python than this 3." in missing["pydantic_core"]
    assert missing["torchao"] == f"torchao is neither installed nor in {tmp_path.name}/: make gpu-wheels"
    complaint = wheels.install(tmp_path, tmp_path / "site")
    assert complaint is not None and "\n" not in complaint, "pip's own words, in a line"


def test_the_page_says_what_is_there_and_the_documentation_has_it(tmp_path: Path) -> None:
    """Nothing is claimed of a GPU that was not measured: the line or the tables are printed from what is kept."""
    assert page.page(tmp_path) == page.NONE
    visit_folder = tmp_path / "H200-2026-11-28"
    visit_folder.mkdir()
    entry = {
        "state": PASSED,
        "seconds": 12.3,
        "tests": {"passed": 3, "failed": 0, "skipped": 0, "recorded": {}, "failures": []},
    }
    found = {"command": "make gpu", "date": "2026-11-28T05:00:00+00:00", "steps": {"kernel": entry}}
    found["card"] = {"name": "NVIDIA H200", "driver": "580", "torch": "2.11"}
    (visit_folder / "gpu.json").write_text(json.dumps(found))
    shown = page.page(tmp_path)
    assert "NVIDIA H200, driver 580, torch 2.11, 2026-11-28" in shown and "| kernel | passed | 12 | 3 passed |" in shown
    assert page.page() in (ROOT / "docs/kernels.md").read_text()
