"""What a run leaves that did not come to its end."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from s3_megatron.data import encoding, inspect, prepare, writer
from s3_megatron.data.sources import RawDocument
from s3_megatron.errors import S3Error
from tests.signals import is_in

pytestmark = pytest.mark.usefixtures("listens_to_ctrl_c")


def start(source: Path, model: Path, prefix: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "s3_megatron.cli", "data", "prepare", str(source), "--workers", "2"]
    command += ["--output", str(prefix), "--tokenizer-model", str(model)]
    root = Path(encoding.__file__).parents[2]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
        start_new_session=True,
    )


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def wait_for(condition: object, what: str, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} did not come in {seconds} s"
        time.sleep(0.02)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1].startswith("Z")
    except FileNotFoundError:
        return True


@pytest.mark.slow
def test_killed_and_interrupted_runs_leave_no_dataset(corpus: Path, model: Path, tmp_path: Path) -> None:
    """Both at once, each in the middle of its writing: an import of Megatron takes 10 s."""
    text = "".join(path.read_text("utf-8") for path in sorted(corpus.iterdir()))
    source = tmp_path / "large.jsonl"
    # 40 MB: tens of seconds of tokenizing, so that the signals come in the middle.
    source.write_text((json.dumps({"text": text}) + "\n") * (40_000_000 // len(text)))
    runs = {sent: start(source, model, tmp_path / sent.name) for sent in (signal.SIGKILL, signal.SIGINT)}
    for sent, run in runs.items():
        partial = tmp_path / f"{sent.name}.bin.partial"
        wait_for(lambda partial=partial: partial.exists() and partial.stat().st_size > 0, partial.name)
        workers = children(run.pid)
        assert len(workers) >= 2
        if sent == signal.SIGINT:
            # Ctrl-C reaches the whole group, and a worker that has just started would say so.
            wait_for(
                lambda workers=workers: all(is_in(each, "SigIgn", signal.SIGINT) for each in workers),
                "the start of the workers",
            )
            os.killpg(run.pid, sent)
        else:
            run.send_signal(sent)
        output = run.communicate(timeout=250)[0]
        assert run.returncode == (130 if sent == signal.SIGINT else -sent), output
        assert "Traceback" not in output
        for worker in workers:
            wait_for(lambda worker=worker: gone(worker), f"the end of worker {worker}")
    left = sorted(path.name for path in tmp_path.iterdir())
    # Nothing can clean up after SIGKILL; what stays has a name that nothing takes for data.
    assert left == ["SIGKILL.bin.partial", "large.jsonl"]
    prepare([corpus / "json_tool.txt"], tmp_path / "SIGKILL", tokenizer_model=model, workers=1)
    assert inspect(tmp_path / "SIGKILL").documents == 1
    assert not list(tmp_path.glob("*.partial"))


def test_a_stop_between_the_two_renames_is_no_dataset(
    corpus: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = writer.publish

    def stop_at_idx(partial: Path, path: Path) -> None:
        if path.suffix == ".idx":
            raise KeyboardInterrupt
        publish(partial, path)

    monkeypatch.setattr(writer, "publish", stop_at_idx)
    with pytest.raises(KeyboardInterrupt):
        prepare([corpus], tmp_path / "a", tokenizer_model=model, workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]
    with pytest.raises(S3Error, match=r"a\.idx is missing"):
        inspect(tmp_path / "a")
    monkeypatch.undo()
    with pytest.raises(S3Error, match=r"a\.bin exists without its \.idx"):
        prepare([corpus], tmp_path / "a", tokenizer_model=model, workers=1)
    (tmp_path / "a.bin").unlink()
    report = prepare([corpus / "json_tool.txt"], tmp_path / "a", tokenizer_model=model, workers=1)
    assert inspect(tmp_path / "a").tokens == report.tokens


def test_two_runs_do_not_write_the_same_files(tmp_path: Path) -> None:
    with writer.new_dataset(tmp_path / "a", 100) as builder:
        builder.add_document([1], [1])
        with (
            pytest.raises(S3Error, match="being written by another run"),
            writer.new_dataset(tmp_path / "a", 100),
        ):
            pass
    assert inspect(tmp_path / "a").tokens == 1


def test_a_dead_worker_ends_the_run(model: Path, tmp_path: Path) -> None:
    """A worker that the kernel kills for its memory must not leave the parent waiting."""

    def documents() -> object:
        for number in range(10_000):
            if number == 3000:
                os.kill(children(os.getpid())[-1], signal.SIGKILL)
            yield RawDocument("a.txt", 1, b"text " * 20, False, 0)

    settings = encoding.EncoderSettings("sentencepiece", model, "text", False)
    with pytest.raises(S3Error, match=r"of 2 worker processes died.*smaller --workers"):
        list(encoding.encode_documents(documents(), settings, 2))


def test_a_run_that_ended_meanwhile_is_not_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two runs had looked before the first was done, and replaced what that had written."""
    with writer.new_dataset(tmp_path / "a", 100) as builder:
        builder.add_document([1], [1])
    with pytest.raises(S3Error, match=r"a\.idx exists"), writer.new_dataset(tmp_path / "a", 100):
        pass
    assert inspect(tmp_path / "a").tokens == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]


def test_a_disk_that_is_full_at_the_last_write_leaves_nothing(tmp_path: Path) -> None:
    """The builder's buffer fails again as it is closed, and the half-written file stayed.

    RLIMIT_FSIZE is the nearest to a full disk that a test can have: write(2) fails with EFBIG instead of ENOSPC.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(S3Error, match="cannot be written: File too large"):
            with writer.new_dataset(tmp_path / "a", 100) as builder:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
                builder.add_document(np.zeros(600, np.int32), [600])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())
