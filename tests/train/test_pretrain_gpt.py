"""The entry on real ranks: Adam trains, saves, and resumes where it was."""

import shutil
from pathlib import Path

import pytest

from s3_megatron.rehearsal.products import VARIABLE
from tests.launcher import losses, torchrun
from tests.train.tiny import FLAGS, MOCK

pytestmark = pytest.mark.distributed

ENTRY = ["-m", "s3_megatron.train.pretrain_gpt", "--rehearsal"]


def test_adam_resumes_from_torch_dist_where_it_was(tmp_path: Path) -> None:
    """megatron-core 0.19.2 alone cannot do this without Transformer Engine: it stops for want of a `step`, and once it
    has one, every parameter shares it, so that 5.138 of iteration 7 became 5.158. Dropout is on: the loader's seed,
    drawn from the generator that stands for the GPU's, would change its masks in the resumed run alone. Products are in
    float32 on every CPU, as on those that are slow in bf16."""
    checkpoints = ["--save", str(tmp_path), "--load", str(tmp_path), "--save-interval", "5", "--train-iters", "10"]
    command = [*ENTRY, *FLAGS, *MOCK, *checkpoints, "--ckpt-format", "torch_dist"]
    full = torchrun(command, nproc=2, timeout=280, env={VARIABLE: "float32"})
    assert full.returncode == 0, full.stderr[-4000:]
    shutil.rmtree(tmp_path / "iter_0000010")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("5")
    resumed = torchrun(command, nproc=2, timeout=280, env={VARIABLE: "float32"})
    assert resumed.returncode == 0, resumed.stderr[-4000:]

    uninterrupted, rest = losses(full.stdout), losses(resumed.stdout)
    assert list(uninterrupted) == list(range(1, 11))
    assert uninterrupted[10] < uninterrupted[1] - 0.3, "the tiny model learns the mock data's ramps"
    # Both runs are deterministic and print 6 decimals; the second line of a run is rebuilt from a mean, to 2e-6.
    assert rest == pytest.approx({step: uninterrupted[step] for step in range(6, 11)}, rel=0, abs=2e-6)

    counts = full.stderr.count("REHEARSAL on CPU"), full.stderr.count("REHEARSAL adds: --distributed-backend gloo")
    assert counts == (1, 1), "rank 0 prints it once"
    assert full.stderr.count("REHEARSAL matrix products: bf16 in float32, rounded once") == 1
    assert "destroy_process_group" not in full.stderr, "torch warns of process groups that were not destroyed"
