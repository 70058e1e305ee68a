"""The metrics file: what is written is read, kills and resumes included."""

from pathlib import Path

from s3_megatron.watch.metrics import FILE_NAME, MetricsWriter, read_metrics


def train(iteration: int, loss: float) -> dict[str, object]:
    return {"event": "train", "iteration": iteration, "lm_loss": loss}


def test_events_are_read_by_kind_and_iteration(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "new" / "folder")
    writer.write({"event": "optimizer", "name": "s3"})
    writer.write(train(1, 5.0))
    writer.write({"event": "validation", "iteration": 1, "lm_loss": 4.0})
    writer.write({"event": "test", "iteration": 1, "lm_loss": 3.0})
    metrics = read_metrics(tmp_path / "new" / "folder")
    assert metrics.optimizer["name"] == "s3"
    assert [m[1]["lm_loss"] for m in (metrics.train, metrics.validation, metrics.test)] == [5.0, 4.0, 3.0]


def test_a_resumed_run_overwrites_what_it_did_again(tmp_path: Path) -> None:
    for losses in ([5.0, 4.0, 3.0], [3.5, 2.5]):
        writer = MetricsWriter(tmp_path)
        start = 4 - len(losses)
        for iteration, loss in enumerate(losses, start=start):
            writer.write(train(iteration, loss))
    assert {i: e["lm_loss"] for i, e in read_metrics(tmp_path).train.items()} == {1: 5.0, 2: 3.5, 3: 2.5}


def test_a_line_torn_by_a_kill_costs_itself_only(tmp_path: Path) -> None:
    """The resumed run's first line used to be glued to the torn one, and both were lost."""
    MetricsWriter(tmp_path).write(train(1, 5.0))
    with (tmp_path / FILE_NAME).open("a") as file:
        file.write('{"event": "train", "iter')
    MetricsWriter(tmp_path).write(train(2, 4.0))
    assert sorted(read_metrics(tmp_path).train) == [1, 2]


def test_a_missing_file_is_an_empty_run(tmp_path: Path) -> None:
    metrics = read_metrics(tmp_path)
    assert metrics.train == {} and metrics.optimizer == {}
