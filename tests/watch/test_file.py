"""The metrics file: what is written is read, whatever a user, a disk or a kill does to it in between."""

import errno
import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from s3_megatron.errors import S3Error
from s3_megatron.watch import file
from s3_megatron.watch.events import Evaluation, Optimizer, Train
from s3_megatron.watch.file import FILE_NAME, Tail, Writer, newest_train, read_metrics


def train(iteration: int, loss: float = 5.0) -> Train:
    return Train(iteration, {"lm_loss": loss})


def losses(folder: Path) -> dict[int, float]:
    return {iteration: event.losses["lm_loss"] for iteration, event in read_metrics(folder).train.items()}


def test_events_are_read_by_kind_and_iteration(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "new" / "folder")
    optimizer = Optimizer("s3", "DistributedOptimizer", 2, 100, [50, 50], 4.0, 2.0)
    for event in (optimizer, train(1), Evaluation("validation", 1, {"lm_loss": 4.0}), Evaluation("test", 1)):
        writer.write(event)
    metrics = read_metrics(tmp_path / "new" / "folder")
    assert metrics.optimizer == optimizer and metrics.train == {1: train(1)}
    assert metrics.validation[1].losses == {"lm_loss": 4.0} and metrics.test[1].losses == {}


def test_a_resumed_run_overwrites_what_it_did_again(tmp_path: Path) -> None:
    for done in ([5.0, 4.0, 3.0], [3.5, 2.5]):
        writer = Writer(tmp_path)
        for iteration, loss in enumerate(done, start=4 - len(done)):
            writer.write(train(iteration, loss))
    assert losses(tmp_path) == {1: 5.0, 2: 3.5, 3: 2.5}


def test_what_a_resumed_run_gave_up_is_no_part_of_it(tmp_path: Path) -> None:
    """The last losses of a run that went back to iteration 2, and has not come further than 3, were those of iteration
    5 and of a validation that it had left behind. A second optimizer, which is described too, gives nothing up."""
    writer, optimizer = Writer(tmp_path), Optimizer("s3", "S3", 1, 100, [100], 8.0, 0.0)
    for event in (optimizer, *map(train, range(1, 6)), Evaluation("validation", 2), Evaluation("validation", 4)):
        writer.write(event)
    for event in (optimizer, train(3, 2.0)):
        writer.write(event)
    assert losses(tmp_path) == {1: 5.0, 2: 5.0, 3: 2.0} and [*read_metrics(tmp_path).validation] == [2]
    for event in (optimizer, train(4, 1.0)):
        writer.write(event)
    assert losses(tmp_path) == {1: 5.0, 2: 5.0, 3: 2.0, 4: 1.0}


def test_the_newest_is_what_was_written_last(tmp_path: Path) -> None:
    """A run that went back to its checkpoint is where it writes now: ``status`` showed the iteration of its end
    before, until training had come past that again."""
    writer = Writer(tmp_path)
    for iteration in (1, 2, 3, 2):
        writer.write(train(iteration))
    writer.write(Evaluation("validation", 3))
    assert [event.iteration for event in newest_train(tmp_path, 3)] == [2, 3, 2]


@pytest.mark.parametrize("torn", [b'{"event": "train", "iter', b"\xff\xfe\x00", b"\0" * 4096])
def test_a_line_torn_by_a_kill_costs_itself_only(tmp_path: Path, torn: bytes) -> None:
    """The resumed run's first line used to be glued to the torn one, and both were lost; a block of zeros, which a
    file system leaves after a power cut, is no UTF-8 error either."""
    writer = Writer(tmp_path)
    writer.write(train(1))
    with (tmp_path / FILE_NAME).open("ab") as damaged:
        damaged.write(torn)
    assert sorted(losses(tmp_path)) == [1]
    for again in (writer, Writer(tmp_path)):  # torn in this process by a full disk, or in one before
        again.write(train(2, 4.0))
    assert losses(tmp_path) == {1: 5.0, 2: 4.0}
    assert newest_train(tmp_path, 1) == [train(2, 4.0)]


def test_a_missing_file_is_an_empty_run(tmp_path: Path) -> None:
    metrics = read_metrics(tmp_path)
    assert metrics.train == {} and metrics.optimizer is None
    assert newest_train(tmp_path, 9) == [] and list(Tail(tmp_path).events()) == []


def test_a_last_line_without_its_end_is_read_and_not_followed(tmp_path: Path) -> None:
    """An editor takes the last newline away; a writer may still be at work."""
    (tmp_path / FILE_NAME).write_text('{"event": "train", "iteration": 7}')
    assert list(read_metrics(tmp_path).train) == [7]
    assert list(Tail(tmp_path, from_start=True).events()) == []


def test_tail_yields_whole_new_lines_only(tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    writer.write(train(1))
    tail = Tail(tmp_path)
    assert list(tail.events()) == []
    writer.write(train(2))
    with (tmp_path / FILE_NAME).open("a") as half:
        half.write('{"event": "tra')
    assert [event.iteration for event in tail.events()] == [2]
    with (tmp_path / FILE_NAME).open("a") as half:
        half.write('in", "iteration": 3}\n')
    assert [event.iteration for event in tail.events()] == [3]


def test_tail_reads_a_file_that_was_made_anew_from_its_start(tmp_path: Path) -> None:
    """The old one was moved away: a tail waited until the new one was longer, and then began inside a line."""
    writer = Writer(tmp_path)
    for iteration in range(1, 9):
        writer.write(train(iteration))
    tail = Tail(tmp_path)
    (tmp_path / FILE_NAME).rename(tmp_path / "old.jsonl")
    writer.write(train(1))
    assert [event.iteration for event in tail.events()] == [1]


def _write_many(folder: Path, first: int) -> None:
    writer = Writer(folder)
    for iteration in range(first, 1000, 2):
        writer.write(train(iteration))


def test_two_writers_mix_no_lines(tmp_path: Path) -> None:
    """Two starts of one run, which its lease ends: each line is whole."""
    both = [multiprocessing.get_context("fork").Process(target=_write_many, args=(tmp_path, i)) for i in (0, 1)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert sorted(losses(tmp_path)) == list(range(1000))
    assert len((tmp_path / FILE_NAME).read_bytes().splitlines()) == 1000


def test_a_line_longer_than_an_event_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a file that something else wrote to: 3 GB without an end of line would be held in memory."""
    monkeypatch.setattr(file, "_LONGEST_LINE", 400)
    monkeypatch.setattr(file, "_BLOCK", 64)
    writer = Writer(tmp_path)
    for size in (0, 100, 399, 400, 401, 1000, 10_000):
        writer.write(train(size))
        with (tmp_path / FILE_NAME).open("ab") as other:
            other.write(b"x" * size + b"\n")
    assert list(losses(tmp_path)) == [event.iteration for event in newest_train(tmp_path, 9)]
    assert len(losses(tmp_path)) == 7


def test_the_end_of_a_large_file_is_found_without_reading_it(tmp_path: Path) -> None:
    """``status`` of a run of months: 3 GB here, of which a disk holds two blocks. Reading it would take seconds and
    the whole of it in memory; a sparse file's hole reads as zeros, so a second is never needed."""
    writer = Writer(tmp_path)
    writer.write(train(1))
    os.truncate(tmp_path / FILE_NAME, 3 * 2**30)
    writer.write(train(2))
    started = time.process_time()
    assert [event.iteration for event in newest_train(tmp_path, 1)] == [2]
    assert time.process_time() - started < 1


def test_a_folder_that_cannot_be_written_is_named_before_training(tmp_path: Path) -> None:
    """It was an OSError of the last rank after the first iteration. A file stands in the way: root may write to
    whatever is only read-only."""
    (tmp_path / "taken").write_text("")
    with pytest.raises(S3Error, match=r"taken/watch/metrics\.jsonl: Not a directory; name a folder"):
        Writer(tmp_path / "taken" / "watch")
    (tmp_path / FILE_NAME).mkdir()
    with pytest.raises(S3Error, match="Is a directory"):
        Writer(tmp_path)
    with pytest.raises(S3Error, match="cannot be read: Is a directory"):
        read_metrics(tmp_path)
    with pytest.raises(S3Error, match="cannot be read: Is a directory"):
        newest_train(tmp_path, 1)


def test_a_writer_that_has_written_nothing_is_no_sign_of_life(tmp_path: Path) -> None:
    """A job's watchdog allows a start an hour, and an iteration some minutes: making the file would begin those."""
    Writer(tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / FILE_NAME).write_text('{"event": "tr')
    before = (tmp_path / FILE_NAME).stat()
    Writer(tmp_path)
    after = (tmp_path / FILE_NAME).stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def test_a_full_disk_costs_lines_and_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """/dev/full refuses every byte, as a full disk does. The file's time still moves, for the watchdog."""
    writer = Writer(tmp_path)
    (tmp_path / FILE_NAME).symlink_to("/dev/full")
    for iteration in (1, 2):
        writer.write(train(iteration))
    assert [record.getMessage() for record in caplog.records] == [
        f"a line of metrics is lost, and more may be: {tmp_path / FILE_NAME}: {os.strerror(errno.ENOSPC)}"
    ]
    (tmp_path / FILE_NAME).unlink()
    writer.write(train(3))
    os.utime(tmp_path / FILE_NAME, (0, 0))
    with pytest.MonkeyPatch.context() as patch:
        # What a disk does that is full in the middle of a line: no file system here is small enough.
        patch.setattr(file, "append_line", _disk_is_full)
        writer.write(train(4))
    assert (tmp_path / FILE_NAME).stat().st_mtime > 0 and len(caplog.records) == 2
    writer.write(train(5))
    assert sorted(losses(tmp_path)) == [3, 5]


def _disk_is_full(path: Path, line: bytes) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_folder_that_is_removed_in_the_middle_costs_lines_and_not_the_run(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "watch")
    (tmp_path / "watch").rmdir()
    writer.write(train(1))
    (tmp_path / "watch").mkdir()
    writer.write(train(2))
    assert sorted(losses(tmp_path / "watch")) == [2]


def test_every_line_is_json_that_any_parser_takes(tmp_path: Path) -> None:
    """Python's json writes NaN as it is, which jq, JavaScript and DuckDB refuse, for the whole file."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    Writer(tmp_path).write(Train(1, {"lm_loss": float("nan"), "mtp": float("-inf")}, grad_norm=float("inf")))
    (line,) = (tmp_path / FILE_NAME).read_text().splitlines()
    assert json.loads(line, parse_constant=refuse)["lm_loss"] == "NaN"
    event = read_metrics(tmp_path).train[1]
    assert event.losses["lm_loss"] != event.losses["lm_loss"]
    assert (event.losses["mtp"], event.grad_norm) == (float("-inf"), float("inf"))
