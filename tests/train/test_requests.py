"""A person's files in the run folder, on real ranks; tests/jobs/node/test_training.py has SAVE and SIGTERM."""

import json
from pathlib import Path

import pytest

from tests.launcher import losses
from tests.ranks import ranks


@pytest.mark.distributed
def test_stop_saves_and_ends_and_only_a_whole_run_is_finished(tmp_path: Path) -> None:
    """A SAVE that could not be removed, another user's or a folder, ended the run with a traceback, at every start."""
    done = ranks(["-m", "tests.train.requests_worker", str(tmp_path)], nproc=2, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    for engine, pointer in (("megatron", "latest_checkpointed_iteration.txt"), ("deepspeed", "latest")):
        assert done.stdout.count(f"{engine} exits with 0") == 2, "both ranks, the first time"
        assert done.stdout.count(f"{engine} returned") == 2, "and the second time"
        run = tmp_path / engine
        assert (run / "ENDED").read_text() == "stopped by the file STOP at iteration 1\n"
        assert not (run / "STOP").exists()
        assert (run / "checkpoints/iter_0000001").is_dir(), "1 is no multiple of --save-interval"
        assert "SAVE was obeyed at iteration 2" in done.stdout, "the second run's first"
        assert not (run / "checkpoints/iter_0000003").exists(), "obeyed once in a run"
        assert (run / "checkpoints" / pointer).read_text() in ("6", "iter_0000006")
        assert json.loads((run / "FINISHED").read_text())["iteration"] == 6
    assert list(losses(done.stdout)) == [1, 2, 3, 4, 5, 6], "none was done twice"
