"""``make gpu``'s own parts, on made-up steps: limits, what is skipped and why, what is written."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.gpu import card, page, report, runner, steps, variants, visit
from benchmarks.gpu.runner import FAILED, LATE, PASSED, SKIPPED, Outcome, Step
from tests.launcher import ROOT
from tests.terminal import lives


def program(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def ran(
    folder: Path,
    made: list[Step],
    seconds: float = 60,
    reasons: dict[str, str] | None = None,
    gib: float = math.inf,
) -> dict[str, Outcome]:
    seen: list[Outcome] = []
    deadline = time.monotonic() + seconds
    outcomes = runner.run(
        made, folder, os.environ, deadline, lambda step: (reasons or {}).get(step.name), seen.extend, gib
    )
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
    assert found["hangs"].reason == "stopped after 2 s, its limit" and "so far" in (tmp_path / "hangs.log").read_text()
    assert (tmp_path / "works.json").read_text() == "[7]"
    assert not left_over("hangs-")


def left_over(beginning: str) -> list[psutil.Process]:
    """Processes of steps whose mark begins so."""
    return [one for one in psutil.process_iter() if (runner._mark(one) or "").startswith(beginning) and lives(one)]


def test_a_signal_while_a_step_starts_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CI's signal came inside of Popen: the process ran, the runner did not know it yet, and it outlived the visit.

    Popen is replaced, since no clock meets that moment.
    """

    def interrupted(*args: Any, popen: Any = subprocess.Popen, **settings: Any) -> None:
        popen(*args, **settings)
        raise KeyboardInterrupt

    monkeypatch.setattr(runner.subprocess, "Popen", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ran(tmp_path, [Step("begins", 1, 30, ["sleep", "600"])])
    assert not left_over("begins-")


def test_the_whole_ends_in_time_and_names_what_had_none(tmp_path: Path) -> None:
    made = [Step("long", 1, 600, ["sleep", "600"]), Step("last", 2, 600, ["true"])]
    started = time.monotonic()
    found = ran(tmp_path, made, seconds=7)
    assert time.monotonic() - started < 7 + runner._GRACE_SECONDS
    assert (found["long"].state, found["last"].state, found["last"].reason) == (LATE, SKIPPED, "no time is left")
    assert found["long"].reason == "stopped after 2 s, when the time was up"


def test_the_profiler_looks_at_the_kernel_as_it_is(tmp_path: Path) -> None:
    """It skipped two launches, and the third is a variant's with another number of registers, under the same name."""
    names = list(variants.variants(tmp_path))
    (step,) = [step for step in steps.steps(tmp_path, dry=False) if step.name == "ncu"]
    skipped = int(step.command[step.command.index("--launch-skip") + 1])
    assert names[skipped % len(names)] == "as it is" and 0 < skipped < len(names) * variants.WARM_UP


# Everything in a thirtieth of its time, but for the grace: psutil looks at every process of a busy machine meanwhile.
SCALE, GRACE = 30, 1.5


@pytest.mark.slow
def test_the_plan_ends_in_time_whatever_its_steps_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step hangs and ignores SIGTERM. They were ended one after the other, each with a grace of its own: six
    side by side took half a minute past the end. The limits add up to more than there is, so the last have no time."""
    monkeypatch.setattr(runner, "_GRACE_SECONDS", GRACE)
    plan = steps.steps(tmp_path, dry=False)
    stages = sorted({step.stage for step in plan})
    longest = [max(step.limit for step in plan if step.stage == stage) for stage in stages]
    minutes = 6
    assert sum(longest) > 60 * minutes, "otherwise nothing is left out, and this test shows less"
    hanging = ["sh", "-c", 'trap "" TERM; while :; do sleep 1; done']
    slow = [replace(step, command=hanging, limit=step.limit / SCALE) for step in plan]
    started, seconds = time.monotonic(), 60 * minutes / SCALE
    found = ran(tmp_path, slow, seconds=seconds)
    assert time.monotonic() - started < seconds + 1.5, "a second and a half is for a busy machine"
    assert list(found) and set(found) == {step.name for step in plan}, "each is named, whatever became of it"
    states = [found[step.name].state for step in plan]
    assert states == sorted(states), "what is worth more comes first: 'over its limit' before 'skipped'"
    assert {LATE, SKIPPED} == set(states) and states[0] == LATE
    assert {one.reason for one in found.values() if one.state == SKIPPED} == {"no time is left"}
    assert report.table(report.figures([*found.values()], tmp_path, {}, "")).row_count == len(plan)
    assert not [process for step in plan for process in left_over(f"{step.name}-")]


def test_the_plan_is_in_order_of_worth(tmp_path: Path) -> None:
    """Whether the kernel is right comes before how fast it is, that before the engines' speed, the profiler last."""
    order = [step.name for step in steps.steps(tmp_path, dry=False)]
    first, last = {"health", "kernel", "optimizer", "engines", "memcheck", "rivals"}, ["ncu"]
    assert set(order[:6]) == first and order[-1:] == last
    assert order.index("variants") < order.index("bench") < order.index("345m-s3") < order.index("megatron-step")


def test_steps_side_by_side_share_the_memory(tmp_path: Path) -> None:
    """Each fits the GPU, and together they ran out of its memory: the larger waits, and what needs none does not."""
    note = f"import time; open({str(tmp_path / 'order')!r}, 'a').write('%s'); time.sleep(.5); "
    note += f"open({str(tmp_path / 'order')!r}, 'a').write('%s')"
    made = [Step(name, 1, 30, program(note % (name, name)), gib=gib) for name, gib in (("a", 20), ("b", 40), ("c", 0))]
    found = ran(tmp_path, made, gib=48.0)
    assert {one.state for one in found.values()} == {PASSED}
    order = (tmp_path / "order").read_text()
    assert order.endswith("bb") and "c" in order[:2], order


def test_a_log_without_end_costs_no_memory(tmp_path: Path) -> None:
    """A step may print for as long as it runs: of its log the end alone is read."""
    log = tmp_path / "loop.log"
    with log.open("wb") as file:
        file.truncate(2**40)  # a hole: no disk has so much
        file.seek(0, os.SEEK_END)
        file.write(b"\nthe last line\n\n")
    assert runner.last_line(log) == "the last line"
    report.archive(tmp_path, tmp_path / "logs.tgz")
    assert (tmp_path / "logs.tgz").stat().st_size < 10**6


@pytest.mark.slow
def test_a_rehearsal_without_the_time_for_it_ends_in_time(tmp_path: Path) -> None:
    """The real steps, on the CPU, in half a minute: what had no time is named, in the table and in the figures."""
    started = time.monotonic()
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry", "--minutes", "0.6", "--out", str(tmp_path / "out")]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert time.monotonic() - started < 36
    assert shown.returncode == 1 and "Traceback" not in shown.stderr, shown.stderr[-2000:]
    found = json.loads((tmp_path / "out/gpu.json").read_text())["steps"]
    assert list(found) and set(found) == {step.name for step in steps.steps(tmp_path, dry=True)}
    table = shown.stdout[shown.stdout.index("no GPU was looked for") :]
    assert all(re.search(rf"^ {name} ", table, flags=re.MULTILINE) for name in found)
    left_out = [name for name, entry in found.items() if entry["state"] == SKIPPED]
    assert "deepspeed-step" in left_out and {found[name]["reason"] for name in left_out} == {"no time is left"}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_visit_that_is_ended_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    """A time limit around it sends SIGTERM, which ended Python without its steps, in sessions of their own."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry", "--out", str(tmp_path / "out")]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as visiting:
        end = time.monotonic() + 120
        while not left_over("kernel-") and time.monotonic() < end:
            time.sleep(0.1)
        assert left_over("kernel-")
        visiting.send_signal(number)
        _, stderr = visiting.communicate(timeout=60)
    assert visiting.returncode == 128 + number and "Traceback" not in stderr, stderr
    assert not left_over("kernel-") and not left_over("optimizer-")
    while list(tmp_path.glob("s3-gpu-*")):  # its folder goes, too
        assert time.monotonic() < end
        time.sleep(0.1)


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


@pytest.mark.parametrize(
    ("script", "obstacle"),
    [
        ("sleep 60", "the driver does not answer in 1 s"),
        # A process that is ended leaves one that holds its output open: that was waited for, without an end.
        ("trap '' TERM; setsid sleep 60 & sleep 60", "the driver does not answer in 1 s"),
        (
            "echo \"ModuleNotFoundError: No module named 'torch'\" >&2; exit 1",
            "torch does not start: exit code 1: ModuleNotFoundError: No module named 'torch'",
        ),
        ("kill -SEGV $$", "torch does not start: exit code -11: $ "),
    ],
)
def test_a_driver_that_hangs_or_ends_who_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, obstacle: str
) -> None:
    """It is asked in a process of its own: one line, which every step then has."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(visit.sys, "executable", str(python))
    monkeypatch.setattr(visit, "_CARD_SECONDS", 1.0)
    started = time.monotonic()
    found = visit._card(tmp_path, dict(os.environ), started + 60)["obstacle"]
    assert found.startswith(obstacle) and "\n" not in found
    assert time.monotonic() - started < 1 + runner._GRACE_SECONDS + 2
    assert not left_over("card-")


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
    """Exit code 1, the reason in every row; what was found is written all the same, though the output is closed."""
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


def test_a_mistake_is_one_line_before_a_step_runs(tmp_path: Path) -> None:
    """A folder for results that is a file was found out after the first step."""
    (tmp_path / "file").touch()
    for words, line in (
        (["--dry", "--out", str(tmp_path / "file")], f"error: {tmp_path}/file/logs.tgz cannot be written: File exists"),
        (["--dry", "--out", "/proc/none"], "error: /proc/none/logs.tgz cannot be written: No such file or directory"),
        (["--minutes", "nan"], "error: --minutes nan leaves no time for a step: give more than 0.5"),
    ):
        command = [sys.executable, "-m", "benchmarks.gpu", *words]
        shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert shown.returncode == 2 and shown.stdout == "" and shown.stderr.strip().endswith(line), shown.stderr
        assert "Traceback" not in shown.stderr


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


def test_the_tools_that_a_machine_may_lack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nsight's programs are no part of CUDA's runtime: where they are missing a row of the table says so."""
    tools = {step.name: step.programs for step in steps.steps(tmp_path, dry=False) if step.programs}
    assert tools == {"memcheck": ("compute-sanitizer",), "ncu": ("ncu",)}
    monkeypatch.setattr(visit.shutil, "which", lambda name: None)
    card = {"obstacle": None, "free_gib": 70.0}
    for step in steps.steps(tmp_path, dry=False):
        if step.programs:
            assert visit._obstacle(step, card, {}) == f"{step.programs[0]} is not on the PATH"


def test_the_page_says_what_is_there_and_the_documentation_has_it(tmp_path: Path) -> None:
    """Nothing is claimed of a GPU that was not measured: the line or the tables are printed from what is kept."""
    assert page.page(tmp_path) == page.NONE
    for name, looked in (("dry", {"obstacle": None}), ("none", {"torch": "2.11", "obstacle": "no GPU"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "gpu.json").write_text(json.dumps({"card": looked, "steps": {}}))
    assert page.page(tmp_path) == page.NONE, "a rehearsal measures nothing of a GPU"
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
