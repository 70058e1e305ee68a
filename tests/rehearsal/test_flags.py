"""The flags that a rehearsal adds, and those it refuses."""

import pytest

from s3_megatron.errors import S3Error
from s3_megatron.rehearsal import add_flags


def test_adds_what_is_missing_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    user = ["--lr", "1e-3", "--num-workers", "2", "--distributed-backend=gloo", "--no-rope-fusion"]
    flags = add_flags(user)
    assert flags[: len(user)] == user
    assert flags[len(user) :][:2] == ["--transformer-impl", "local"]
    for given in ("--num-workers", "--no-rope-fusion", "--distributed-backend"):
        assert sum(flag.startswith(given) for flag in flags) == 1, "a user's flag stays the only one"
    assert capsys.readouterr().err == f"REHEARSAL adds: {' '.join(flags[len(user) :])}\n"

    assert add_flags(flags) == flags
    monkeypatch.setenv("RANK", "1")
    add_flags([])
    assert capsys.readouterr().err == "", "nothing to add, or not rank 0"


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--distributed-backend", "nccl"], "NCCL needs a GPU"),
        (["--distributed-backend=nccl"], "NCCL needs a GPU"),
        (["--transformer-impl", "transformer_engine"], "Transformer Engine runs on GPUs only"),
        (["--async-save"], "written by the ranks themselves"),
    ],
)
def test_refuses_what_needs_a_gpu(flags: list[str], reason: str) -> None:
    with pytest.raises(S3Error, match=reason) as refused:
        add_flags(flags)
    assert flags[-1].split("=")[-1] in str(refused.value)
