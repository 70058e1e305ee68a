"""Which checkpoint a run resumes from; tests/jobs/node/test_training.py has Megatron's real ones."""

import json
import os
import pickle
import shutil
import time
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as dcp

from s3_megatron.checkpoints.metadata import stored_files
from s3_megatron.checkpoints.whole import LOAD_FAILED, newest, repair_pointer
from s3_megatron.errors import S3Error

TRACKER = "latest_checkpointed_iteration.txt"
FILES = {
    "megatron": (".metadata", "metadata.json", "__0_0.distcp", "__0_1.distcp"),
    "deepspeed": ("s3_megatron.json", "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"),
}
STATES = FILES["deepspeed"][1:]
POINTER = {"megatron": TRACKER, "deepspeed": "latest"}
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # it saves alone
engines = pytest.mark.parametrize("engine", FILES)


def checkpoint(folder: Path, engine: str, iteration: int) -> Path:
    """One as torch writes it, which is Megatron's torch_dist but for the names; or one as DeepSpeed does."""
    path = folder / f"iter_{iteration:07d}"
    path.mkdir(parents=True)
    if engine == "megatron":
        writer = dcp.FileSystemWriter(path, single_file_per_rank=False)
        dcp.save({"weight": torch.ones(100), "bias": torch.ones(7)}, storage_writer=writer, no_dist=True)
        (path / "metadata.json").write_text("{}")
    else:
        for file in STATES:
            torch.save({"weight": torch.ones(100)}, path / file)
        sizes = {file: (path / file).stat().st_size for file in STATES}
        (path / "s3_megatron.json").write_text(json.dumps({"zero_stage": 1, "files": sizes}))
    assert sorted(file.name for file in path.iterdir()) == sorted(FILES[engine])
    return path


def newest_whole(folder: Path) -> int | None:
    return newest(folder).iteration


def point(folder: Path, engine: str, iteration: int) -> None:
    (folder / POINTER[engine]).write_text(name(engine, iteration))


def name(engine: str, iteration: int) -> str:
    return str(iteration) if engine == "megatron" else f"iter_{iteration:07d}"


@engines
def test_each_file_counts(tmp_path: Path, engine: str) -> None:
    """A kill leaves files out, a full disk leaves them empty, a file server cuts them off. Of a checkpoint without one
    of its shards `status` reported it as whole, and every start of the job failed on it."""
    checkpoint(tmp_path, engine, 4)
    found = newest(tmp_path)
    assert found.iteration == 4 and 0 <= found.age < 60 and found.torn == ()
    for file in FILES[engine]:
        torn = checkpoint(tmp_path, engine, 8)
        whole = (torn / file).read_bytes()
        for left in (whole[: len(whole) // 2], whole[:-1], b""):
            if file == "metadata.json" and left:
                continue  # Megatron's own, two words
            (torn / file).write_bytes(left)
            assert newest_whole(tmp_path) == 4, (file, len(left))
            assert file in newest(tmp_path).torn_text
        (torn / file).unlink()
        assert newest_whole(tmp_path) == 4, file
        assert newest(tmp_path).torn_text.startswith("iteration 8 is not whole: ")
        shutil.rmtree(torn)
    (tmp_path / "iter_0000008").mkdir()
    assert newest_whole(tmp_path) == 4, "an empty folder"


def test_deepspeeds_older_checkpoints_have_no_sizes(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, "deepspeed", 4)
    (path / "s3_megatron.json").write_text('{"zero_stage": 1}')
    assert newest_whole(tmp_path) == 4
    state = path / STATES[0]
    state.write_bytes(state.read_bytes()[:-1])
    assert newest(tmp_path).torn == ((4, f"{STATES[0]} is cut off"),)


@engines
def test_what_could_not_be_loaded_is_passed_over_until_it_is_saved_anew(tmp_path: Path, engine: str) -> None:
    for iteration in (4, 8):
        checkpoint(tmp_path, engine, iteration)
    point(tmp_path, engine, 8)
    (tmp_path / "iter_0000008" / LOAD_FAILED).write_text("OSError: a bad block\n")
    assert newest(tmp_path).torn_text == "iteration 8 is not whole: it could not be loaded (OSError: a bad block)"
    message = repair_pointer(tmp_path)
    assert (
        message is not None and "(it could not be loaded (OSError: a bad block)): it now names iteration 4" in message
    )
    for file in FILES[engine]:
        os.utime(tmp_path / "iter_0000008" / file, (time.time() + 5,) * 2)
    assert newest_whole(tmp_path) == 8
    # Of one time, as file systems that count in seconds have it, the mark is the later: it was written last.
    for name in (*FILES[engine], LOAD_FAILED):
        os.utime(tmp_path / "iter_0000008" / name, (1e9, 1e9))
    assert newest_whole(tmp_path) == 4
    # What the line advises besides: "or this one again if MARK is removed".
    os.utime(tmp_path / "iter_0000008" / LOAD_FAILED, (time.time() + 9,) * 2)
    assert newest_whole(tmp_path) == 4
    (tmp_path / "iter_0000008" / LOAD_FAILED).unlink()
    assert newest_whole(tmp_path) == 8


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("pwned",)


def test_a_metadata_file_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a pickle, and `status` reads it in folders that others can write to."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / ".metadata"
    for text in (pickle.dumps(_Evil()), b"cos\nsystem\n(S'mkdir pwned'\ntR."):
        path.write_bytes(text)
        with pytest.raises(ValueError, match=r"\.metadata is torn"):
            stored_files(path)
    assert [file.name for file in tmp_path.iterdir()] == [".metadata"]


def test_names_and_sizes_are_those_of_torchs_own_reader(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, "megatron", 4)
    stored = dcp.FileSystemReader(path).read_metadata().storage_data.values()
    assert stored_files(path / ".metadata").keys() == {one.relative_path for one in stored}
    assert stored_files(path / ".metadata") == {
        file: (path / file).stat().st_size for file in FILES["megatron"] if file.endswith("distcp")
    }


@engines
def test_a_pointer_to_a_whole_checkpoint_stays(tmp_path: Path, engine: str) -> None:
    """A user may have gone back to it, before a spike of the loss."""
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
        message = repair_pointer(tmp_path)
        assert message is not None and "it now names iteration 8" in message and "\n" not in message
        assert ("is missing" if broken is None else repr(name(engine, broken))) in message
        assert (tmp_path / POINTER[engine]).read_text() == name(engine, 8)
        assert repair_pointer(tmp_path) is None


@engines
def test_no_run_starts_from_nothing_beside_torn_checkpoints(tmp_path: Path, engine: str) -> None:
    (checkpoint(tmp_path, engine, 4) / FILES[engine][0]).unlink()
    message = repair_pointer(tmp_path)
    assert message is not None and "as a kill in the first save leaves it: starting anew" in message
    for point_to in (None, 4):
        if point_to is None:
            (checkpoint(tmp_path, engine, 8) / FILES[engine][0]).unlink()
        else:
            point(tmp_path, engine, point_to)
        with pytest.raises(S3Error, match=r"no checkpoint in .* is whole") as refused:
            repair_pointer(tmp_path)
        assert "\n" not in str(refused.value)
    assert "move the folder away if that is wanted, or bring a checkpoint back" in str(refused.value)
    _follow_that_advice(tmp_path, engine)


def _follow_that_advice(folder: Path, engine: str) -> None:
    """Either way: a folder moved away and made anew by the next run, and a checkpoint brought back from elsewhere."""
    away = folder.rename(f"{folder}-away")
    assert repair_pointer(folder) is None and newest_whole(folder) is None, "a run starts from random weights"
    checkpoint(folder, engine, 2)
    point(folder, engine, 2)
    assert repair_pointer(folder) is None, "and goes on from its own"
    shutil.copytree(folder / "iter_0000002", away / "iter_0000002")
    line = repair_pointer(away)
    assert line is not None and "it now names iteration 2" in line
    assert newest_whole(away) == 2 and (away / POINTER[engine]).read_text() == name(engine, 2)


def test_a_folder_without_checkpoints_and_a_release_are_left_alone(tmp_path: Path) -> None:
    assert repair_pointer(tmp_path / "none") is None
    assert newest_whole(tmp_path / "none") is None
    (tmp_path / TRACKER).write_text("release")
    assert repair_pointer(tmp_path) is None
