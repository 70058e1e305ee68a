"""What a start says, and leaves behind, of a checkpoint that it cannot load."""

from pathlib import Path

import pytest
from torch.distributed.checkpoint.api import CheckpointException

from s3_megatron.checkpoints.whole import LOAD_FAILED
from s3_megatron.errors import S3Error
from s3_megatron.train.loading import LoadError, watched

TORN = RuntimeError("PytorchStreamReader failed reading zip archive: failed finding central directory")


def fails(folder: Path, error: BaseException) -> str:
    """The one line of a load that raised ``error``."""
    with pytest.raises((LoadError, S3Error)) as refused, watched(lambda: folder):
        raise error
    assert "\n" not in str(refused.value)
    assert isinstance(refused.value, S3Error) == isinstance(error, AssertionError)
    return str(refused.value)


@pytest.mark.parametrize("error", [EOFError("ran out"), OSError(5, "Input/output error"), TORN])
@pytest.mark.parametrize("gathered", [False, True])
def test_damage_is_marked_in_a_job_and_answered_with_advice_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, gathered: bool
) -> None:
    """torch gathers what ranks raise while they read in a CheckpointException, which derives from BaseException."""
    seen: BaseException = CheckpointException("load", {1: (error, None)}) if gathered else error
    monkeypatch.delenv("S3_RUN_DIR", raising=False)
    assert "--ckpt-step" in fails(tmp_path, seen)
    assert not (tmp_path / LOAD_FAILED).exists()
    monkeypatch.setenv("S3_RUN_DIR", str(tmp_path))
    assert "the next start tries the one before it" in fails(tmp_path, seen)
    assert (tmp_path / LOAD_FAILED).read_text().startswith(f"{type(error).__name__}: ")


@pytest.mark.parametrize(
    "error",
    [
        AssertionError("num_layers value from checkpoint (4) is not equal to the input argument value (2)"),
        KeyError("optimizer"),
        RuntimeError("Error(s) in loading state_dict: size mismatch"),
        ConnectionResetError("a peer is gone"),
        CheckpointException("load", {0: (ValueError("Size mismatch"), None)}),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_says_nothing_of_the_files_marks_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """Another model, or a lost peer: the checkpoint is whole, and the next start must not pass over it."""
    monkeypatch.setenv("S3_RUN_DIR", str(tmp_path))
    assert str(tmp_path) in fails(tmp_path, error)
    assert not list(tmp_path.iterdir())
