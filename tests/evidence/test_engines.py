"""The runs of an experiment as jobs of Megatron's own engine."""

import io
import math

import pytest
import yaml
from rich.console import Console

from s3_megatron.errors import S3Error
from s3_megatron.evidence import engines, experiments, quick
from s3_megatron.evidence.compare import compare
from s3_megatron.evidence.plan import Plan
from s3_megatron.jobs.flags import megatron_flags


def written(folder, **changes):
    """Write an experiment of two contenders, one run each, over Python's documentation."""
    quick.write_corpus(folder / "text.xz")
    setup = {"steps": 12, "layers": 2, "width": 32, "heads": 2, "length": 32, "batch": 4, "validation": 16384}
    content = {
        "title": "Engines, tiny",
        "reference": "s3",
        "text": str(folder / "text.xz"),
        "setups": {"base": setup},
        "seeds": [1],
        "contenders": {
            "s3": {"optimizer": "s3", "rates": [1.2e-2], "settings": {"beta": 0.9, "p": 2}},
            "adamw": {"optimizer": "adamw", "rates": [4.0e-3], "settings": {"betas": [0.8, 0.95]}},
        },
    }
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump({**content, **changes}))
    return experiments.load(str(file))


def test_a_job_gets_all_that_its_cell_has(tmp_path):
    """A setting that stays behind, such as one beta, would compare two different optimizers."""
    plan = Plan(written(tmp_path), "0" * 64)
    flags = {}
    for name in ("s3", "adamw"):
        ((configuration, _),) = plan.final(name, "base", {}).items()
        job = engines.as_job(plan.cell(name, "base", configuration, 7), tmp_path, validation=16384)
        flags[name] = {flag[0]: flag[1:] for flag in megatron_flags(job, tmp_path / "run")}
    words = {flag: values[0] for flag, values in flags["s3"].items() if values}
    ours = {"lr": 1.2e-2, "min-lr": 0, "weight-decay": 3e-4 / 1.2e-2, "s3-beta": 0.9, "s3-p": 2, "seed": 7}
    ours |= {"train-iters": 12, "lr-warmup-iters": round(0.05 * 12), "lr-decay-iters": 12, "clip-grad": 1}
    ours |= {"num-layers": 2, "hidden-size": 32, "num-attention-heads": 2, "seq-length": 32}
    ours |= {"global-batch-size": 4, "eval-iters": 128}
    # As flags spell them: with twelve digits.
    assert {name: float(words[f"--{name}"]) for name in ours} == pytest.approx(ours, rel=1e-11, abs=0)
    theirs = {"lr": 4e-3, "weight-decay": 3e-4 / 4e-3, "adam-beta1": 0.8, "adam-beta2": 0.95}
    assert {name: float(flags["adamw"][f"--{name}"][0]) for name in theirs} == pytest.approx(theirs, rel=1e-11, abs=0)
    assert "--bf16" not in flags["s3"] and words["--optimizer"] == "s3" and flags["adamw"]["--optimizer"] == ["adam"]


def test_what_cannot_be_compared_is_refused_before_a_job_starts(tmp_path):
    rates = {"optimizer": "s3", "rates": [1e-3, 1e-2], "settings": {}}
    for contenders in ({"s3": rates}, None):
        asked = written(tmp_path, **({"contenders": contenders} if contenders else {}))
        (tmp_path / "cells.jsonl").unlink(missing_ok=True)
        if contenders:
            compare(asked, tmp_path, Console(file=io.StringIO()), device="cpu", minutes=math.inf, workers=1)
        with pytest.raises(S3Error, match="one rate a contender" if contenders else "s3-megatron compare writes it"):
            engines.run(asked, tmp_path)
    assert not (tmp_path / "jobs").exists()


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_of_the_stack_is_a_job_with_the_same_model(tmp_path):
    """Two real jobs on two ranks each; a model with other weights than the stack's would be refused."""
    asked = written(tmp_path)
    assert compare(asked, tmp_path, Console(file=io.StringIO()), device="cpu", minutes=math.inf, workers=1)
    shown = engines.run(asked, tmp_path)
    rows = [line.strip("| ").split(" | ") for line in shown.splitlines() if line.startswith(("| s3 ", "| adamw "))]
    for _, _, stack, job, *_ in rows:
        # Both have learned as much in 12 steps, from ln 256 = 5.5; other weights and orders differ by a tenth or two.
        assert float(stack) < 5 and float(job) == pytest.approx(float(stack), abs=0.4)
    assert [len(row) for row in rows] == [6, 6, 4, 4], "means, then runs"
    times = [path.stat().st_mtime_ns for path in sorted((tmp_path / "jobs").glob("*/logs/job.log"))]
    assert engines.run(asked, tmp_path) == shown and len(times) == 2
    assert times == [path.stat().st_mtime_ns for path in sorted((tmp_path / "jobs").glob("*/logs/job.log"))]
