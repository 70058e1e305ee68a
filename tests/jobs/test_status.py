"""What is reported of runs: their status, their logs, and what is missing in their folders."""

import json
import os
import shutil
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from s3_megatron import cli
from s3_megatron.errors import S3Error
from s3_megatron.jobs import edits, logs, runs, status, submit
from s3_megatron.jobs.runs import Run
from s3_megatron.watch.events import Train
from s3_megatron.watch.file import Writer
from tests.jobs.run_folders import make

pytestmark = pytest.mark.usefixtures("state_folder")


def text(renderable: Any) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def attempt(run: Run, name: str, **verdicts: dict[str, Any]) -> None:
    folder = run.path / "attempts" / name
    folder.mkdir(parents=True)
    for host, verdict in verdicts.items():
        (folder / f"{host}.json").write_text(json.dumps(verdict))
        (folder / f"{host}.failures.json").write_text("[]")
    time.sleep(0.02)  # attempts are told apart by their time


def error(rank: int, host: str, message: str, when: float) -> dict[str, Any]:
    found = {"rank": rank, "host": host, "message": message, "time": when}
    return {"verdict": "failed", "exit_code": 1, "error": found, "iteration": 5}


def test_status_says_how_a_held_job_starts_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A controller that dies while a start leaves bad nodes out, between requeuehold and release, leaves the job held.

    scontrol is a stub: on the real cluster (tests/slurm) it would take a controller that dies within a second."""
    stub = tmp_path / "scontrol"
    stub.write_text("#!/bin/sh\necho JobId=7 JobState=PENDING Reason=JobHeldUser NodeList=\n")
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    cluster = SimpleNamespace(scheduler="slurm")
    run = SimpleNamespace(
        finished=False, ended=None, job=SimpleNamespace(cluster=cluster), job_ids=["7"], path=tmp_path
    )
    assert status._state(run, []) == "pending as job 7 (JobHeldUser): 'scontrol release 7' lets it start"


def test_status_shows_what_failed_first_and_not_what_was_last(tmp_path: Path):
    """Of a hundred lines of NCCL, the first failure on any node is the one to read; and only the last bad start's."""
    run = make(tmp_path)
    assert status.status(run).state == "not started: s3-megatron resume first"
    attempt(run, "7-0", node1=error(0, "node1", "old", 1.0))
    attempt(run, "7-1", node1=error(3, "node1", "NCCL: connection closed", 20.0), node2=error(9, "node2", "OOM", 19.0))
    writer = Writer(run.path / "watch")
    for iteration, seconds in ((1, None), (2, 2.0), (3, 2.0)):
        writer.write(Train(iteration, {"lm_loss": 8.5}, seconds=seconds))
    found = status.status(run)
    assert found.error == "rank 9 on node2: OOM" and found.restarts == 1
    assert (found.iteration, found.iterations, found.loss) == (3, 128, 8.5)
    assert found.tokens_per_second == 16 * 128 / 2
    assert found.state == "stopped (failed): s3-megatron resume first"
    shown = text(status.table(found))
    for fact in ("3 of 128", "8.5000", "1,024", "rank 9 on node2: OOM"):
        assert fact in shown
    (run.path / "ENDED").write_text("configuration error: [bold]wrong[/bold]\n")
    assert "ended: configuration error: [bold]wrong[/bold]" in text(status.overview([run]))
    (run.path / "FINISHED").write_text("{}")
    found = status.status(run)
    assert (found.state, found.error) == ("finished", None)
    with pytest.raises(
        S3Error, match=r"has finished: to train on, raise schedule.train_iters in .*, remove .*/FINISHED"
    ):
        submit.resume(run, print)


def test_one_run_that_cannot_be_read_hides_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A recipe.yaml with a slip, or one of a version before with a key that is gone, ended ``s3-megatron runs``."""
    for name in ("first", "second", "third"):
        make(tmp_path, name)
    recipe = tmp_path / "runs/second/recipe.yaml"
    recipe.write_text(recipe.read_text() + "no_such_key: 1\n")
    (tmp_path / "runs/third/jobs.jsonl").mkdir()  # OSError, as of a file server that is away
    (tmp_path / "runs/third/watch").mkdir()
    (tmp_path / "runs/third/watch/metrics.jsonl").mkdir()
    rows = {line.split()[0]: line for line in text(status.overview(runs.known_runs())).splitlines()[1:]}
    assert "not started" in rows["first"]
    assert "cannot be read: " in rows["second"] and "no_such_key" in rows["second"]
    assert "cannot be read: " in rows["third"] and "Is a directory" in rows["third"]


def test_what_is_missing_in_a_run_folder_is_one_line(tmp_path: Path):
    run = make(tmp_path)
    attempt(run, "local-1", node1={"verdict": "saved", "error": None})
    (run.path / "attempts/local-1/node0.json").write_text('{"verdict": "fai')
    assert status.status(run).error is None, "what cannot be read is no error"
    script, about = run.script.read_text(), run.about.read_text()
    for broken in ("{", "[]"):
        run.about.write_text(broken)
        with pytest.raises(S3Error, match=r"about\.json .*bring it back, or submit its recipe\.yaml as a new run"):
            edits.apply(run)
    run.about.unlink()
    with pytest.raises(S3Error, match=r"about\.json cannot be read .*bring it back"):
        edits.apply(run)
    run.about.write_text(about)
    run.script.unlink()
    with pytest.raises(S3Error, match=r"first has neither job\.sbatch nor job\.sh: "):
        submit.resume(run, print)
    (run.path / "job.sh").write_text(script)
    with pytest.raises(S3Error, match="there is no run 'aaa"):
        runs.find("a" * 300)  # an OSError: a longer name than any file's


def test_bad_nodes_are_the_error_of_a_start_that_did_not_train(tmp_path: Path):
    run = make(tmp_path)
    (run.path / "attempts/7-0").mkdir(parents=True)
    (run.path / "attempts/7-0/bad_nodes").write_text("node2\tonly 0.1 GiB free\n")
    assert status.status(run).error == "node2: only 0.1 GiB free"


def test_logs_of_all_nodes_in_one_stream(tmp_path: Path):
    run = make(tmp_path)
    with pytest.raises(S3Error, match="has written no log yet"):
        next(logs.lines(run, follow=False))
    (run.path / "logs/job.log").write_text("start 1\n")
    (run.path / "logs/node1.log").write_text("[local_rank0]: hello\n[local_rank1]: torn")
    assert list(logs.lines(run, follow=False)) == [
        "job: start 1",
        "node1: [local_rank0]: hello",
        "node1: [local_rank1]: torn",
    ]
    following = logs.lines(run, follow=True)
    assert [next(following), next(following)] == ["job: start 1", "node1: [local_rank0]: hello"]
    with (run.path / "logs/node1.log").open("a") as file:
        file.write(" no more\n")
    assert next(following) == "node1: [local_rank1]: torn no more"


def test_a_log_is_not_held_in_memory(tmp_path: Path):
    """``s3-megatron logs`` took four times the size of the log in memory: 20 GB of a log of 5, on a login node."""
    run = make(tmp_path)
    size = 2**25
    with (run.path / "logs/node1.log").open("wb") as file:
        file.write(b"first\n")
        file.truncate(size)  # a line without an end, of zeros
        file.seek(size)
        file.write(b"\nlast\n")
    for follow in (False, True):
        tracemalloc.start()
        lines = logs.lines(run, follow)
        assert next(lines) == "node1: first"
        assert sum(len(next(lines)) - len("node1: ") for _ in range(size // 2**20)) == size - len("first\n")
        assert next(lines) == "node1: last"
        assert tracemalloc.get_traced_memory()[1] < size / 4
        tracemalloc.stop()


def test_the_list_of_runs_cuts_no_name_off(tmp_path: Path):
    """In 80 columns a default name ended in an ellipsis, and so did the command that was to be pasted."""
    name = "gpt2_345m-softsignum-20261129-144500"
    run = make(tmp_path, name)
    for rows in (status.overview([run]), status.table(status.status(run))):
        console = Console(width=80)
        with console.capture() as capture:
            console.print(rows)
        assert "…" not in capture.get()
    done = CliRunner().invoke(cli.app, ["runs"])
    assert f"not started: s3-megatron resume {name}" in done.stdout, "on one line, for a file or a pipe"


def test_a_run_that_was_moved_to_another_disk_has_its_starts_in_order(tmp_path: Path):
    """The order of the copy was the order of the starts: status showed an old error as that of the last one."""
    run = make(tmp_path)
    for name in ("9-0", "10-0", "7-0"):
        attempt(run, name)
    copy = tmp_path / "runs/copy"
    (copy / "attempts").mkdir(parents=True)
    for name in ("7-0", "9-0", "10-0"):
        shutil.copytree(run.path / "attempts" / name, copy / "attempts" / name)
        time.sleep(0.02)
    assert [one.path.name for one in Run(copy).attempts()] == ["9-0", "10-0", "7-0"]


def test_a_file_of_the_future_is_of_now():
    """On a file server whose clock is ahead a checkpoint was saved "-3 s ago"."""
    assert (status._age(-3), status._age(7300)) == ("0 s", "2 h")
