"""The stock road is intact, and Adam's checkpoints do not slip into S3, in real launches."""

import re
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from s3_megatron.watch.file import read_metrics
from tests.engines.megatron.gpt import ENTRY, SCRIPT, flags
from tests.ranks import ranks

pytestmark = pytest.mark.distributed


def exact_losses(folder: Path) -> list[tuple[int, float]]:
    """The losses that Megatron itself wrote for TensorBoard, as float32."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("lm loss")]


@pytest.fixture(scope="module")
def adams_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a script that does not use S3, in a process where install() has not run; leaves a checkpoint."""
    folder = tmp_path_factory.mktemp("adam")
    command = flags(iterations=6, optimizer="adam", checkpoints=folder / "checkpoints", save_every=6)
    # Megatron sums the first iteration into the second's line, but not into what it writes here.
    command += ["--tensorboard-dir", str(folder / "board"), "--tensorboard-log-interval", "1"]
    run = ranks(["-m", "tests.engines.megatron.bare", str(SCRIPT), *command], nproc=2, timeout=280)
    assert run.returncode == 0, run.stderr[-4000:]
    assert "S3 active" not in run.stderr + run.stdout
    return folder


def test_adam_is_bit_identical_with_s3_installed(adams_run: Path, tmp_path: Path) -> None:
    command = flags(iterations=6, optimizer="adam")
    command += ["--tensorboard-dir", str(tmp_path), "--tensorboard-log-interval", "1", "--watch-dir", str(tmp_path)]
    run = ranks(["-m", "s3_megatron.train.run", "--rehearsal", str(SCRIPT), *command], nproc=2, timeout=280)
    assert run.returncode == 0, run.stderr[-4000:]
    stock = exact_losses(adams_run / "board")
    assert [step for step, _ in stock] == [1, 2, 3, 4, 5, 6] and stock[0] != stock[-1]
    assert exact_losses(tmp_path) == stock
    event = read_metrics(tmp_path).train[6]
    assert event.updates.mean > 0 and event.updates.saturated is None and event.updates.agreement is None


def test_adams_checkpoint_is_refused_in_one_line(adams_run: Path, tmp_path: Path) -> None:
    command = flags(iterations=8, checkpoints=adams_run / "checkpoints")
    run = ranks([*ENTRY, *command, "--save", str(tmp_path / "nothing")], nproc=2, timeout=280)
    assert run.returncode != 0
    errors = re.findall(r"^s3_megatron: error: (.*)$", run.stderr, flags=re.MULTILINE)
    assert len(errors) == 1 and "--s3-from-adam" in errors[0], run.stderr[-4000:]
    assert not (tmp_path / "nothing" / "latest_checkpointed_iteration.txt").exists()


def test_adams_checkpoint_goes_on_under_s3_when_asked(adams_run: Path, tmp_path: Path) -> None:
    """With S3's own rates: Megatron would refuse the changed peak rate of the schedule."""
    command = flags(iterations=8, checkpoints=adams_run / "checkpoints", extra=("--s3-from-adam",))
    run = ranks([*ENTRY, *command, "--save", str(tmp_path)], nproc=2, timeout=280)
    assert run.returncode == 0, run.stderr[-4000:]
    assert "S3 active in DistributedOptimizer" in run.stderr + run.stdout
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "8"
