"""Which checkpoint a run resumes from; tests/jobs/test_node_training.py has Megatron's real ones."""

from pathlib import Path

import pytest

from s3_megatron.errors import S3Error
from s3_megatron.jobs.node.checkpoints import newest, newest_complete, repair_pointer

TRACKER = "latest_checkpointed_iteration.txt"
FILES = {
    "megatron": (".metadata", "metadata.json", "__0_0.distcp", "__1_0.distcp"),
    "deepspeed": ("s3_megatron.json", "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"),
}
POINTER = {"megatron": TRACKER, "deepspeed": "latest"}
engines = pytest.mark.parametrize("engine", FILES)


def checkpoint(folder: Path, engine: str, iteration: int) -> Path:
    path = folder / f"iter_{iteration:07d}"
    path.mkdir(parents=True)
    for name in FILES[engine]:
        (path / name).write_text("x")
    return path


def point(folder: Path, engine: str, iteration: int) -> None:
    (folder / POINTER[engine]).write_text(name(engine, iteration))


def name(engine: str, iteration: int) -> str:
    return str(iteration) if engine == "megatron" else f"iter_{iteration:07d}"


@engines
def test_each_file_counts(tmp_path: Path, engine: str) -> None:
    """A kill leaves files out, a full disk leaves them empty."""
    checkpoint(tmp_path, engine, 4)
    found = newest(tmp_path)
    assert found is not None and found[0] == 4 and 0 <= found[1] < 60
    for file in FILES[engine]:
        torn = checkpoint(tmp_path, engine, 8)
        (torn / file).write_text("")
        assert newest_complete(tmp_path) == 4, file
        if not file.endswith((".distcp", ".pt")):
            (torn / file).unlink()
            assert newest_complete(tmp_path) == 4, file
        for rest in torn.iterdir():
            rest.unlink()
        assert newest_complete(tmp_path) == 4, "an empty folder"
        torn.rmdir()


@engines
def test_a_pointer_to_a_whole_checkpoint_stays(tmp_path: Path, engine: str) -> None:
    """Somebody may have gone back to it, before a spike of the loss."""
    for iteration in (4, 8):
        checkpoint(tmp_path, engine, iteration)
    point(tmp_path, engine, 4)
    assert repair_pointer(tmp_path) is None
    assert (tmp_path / POINTER[engine]).read_text() == name(engine, 4)


@engines
def test_a_pointer_is_led_to_the_newest_whole_checkpoint(tmp_path: Path, engine: str) -> None:
    for iteration in (4, 8, 12):
        checkpoint(tmp_path, engine, iteration)
    (tmp_path / "iter_0000012" / FILES[engine][0]).unlink()
    (tmp_path / "iter_0000016_universal").mkdir()
    for broken in (12, 20, None):
        (tmp_path / POINTER[engine]).unlink(missing_ok=True)
        if broken is not None:
            point(tmp_path, engine, broken)
        said = repair_pointer(tmp_path)
        assert said is not None and "it now names iteration 8" in said and "\n" not in said
        assert ("is missing" if broken is None else repr(name(engine, broken))) in said
        assert (tmp_path / POINTER[engine]).read_text() == name(engine, 8)
        assert repair_pointer(tmp_path) is None


@engines
def test_no_run_starts_from_nothing_beside_torn_checkpoints(tmp_path: Path, engine: str) -> None:
    (checkpoint(tmp_path, engine, 4) / FILES[engine][0]).unlink()
    said = repair_pointer(tmp_path)
    assert said is not None and "as a kill in the first save leaves it: starting anew" in said
    for point_to in (None, 4):
        if point_to is None:
            (checkpoint(tmp_path, engine, 8) / FILES[engine][0]).unlink()
        else:
            point(tmp_path, engine, point_to)
        with pytest.raises(S3Error, match=r"no checkpoint in .* is whole") as refused:
            repair_pointer(tmp_path)
        assert "\n" not in str(refused.value)


def test_a_folder_without_checkpoints_and_a_release_are_left_alone(tmp_path: Path) -> None:
    assert repair_pointer(tmp_path / "none") is None
    assert newest(tmp_path / "none") is None
    (tmp_path / TRACKER).write_text("release")
    assert repair_pointer(tmp_path) is None
