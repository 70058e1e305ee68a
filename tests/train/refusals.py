"""What a person reads who gave an entry point the wrong flags."""

from collections.abc import Callable

import pytest

from s3_megatron.errors import S3Error

# The flags that the rehearsal cannot do without, for entry points that are called in the tests' own process.
REHEARSED = ("--distributed-backend", "gloo", "--transformer-impl", "local")


def refusal(train: Callable[[], object], monkeypatch: pytest.MonkeyPatch, *argv: str) -> str:
    """Train with ``argv``; returns the one line that a user would see."""
    from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator
    from megatron.training.global_vars import destroy_global_vars

    monkeypatch.setattr("sys.argv", ["entry", *argv, *REHEARSED])
    try:
        with pytest.raises(S3Error) as refused:
            train()
    finally:
        destroy_global_vars()
        unset_num_microbatches_calculator()
    line = str(refused.value)
    assert "\n" not in line
    return line
