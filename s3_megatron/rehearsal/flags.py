"""The Megatron flags that a rehearsal needs."""

import itertools
import sys

from s3_megatron.errors import S3Error
from s3_megatron.machine import is_first_rank

# What megatron-core 0.19.2 cannot do without on a CPU, found by leaving each out.
_NEEDED = {
    "--distributed-backend": "gloo",
    "--transformer-impl": "local",
    "--no-persist-layer-norm": None,
    "--no-gradient-accumulation-fusion": None,
    "--no-masked-softmax-fusion": None,
    "--no-rope-fusion": None,
    "--num-workers": "0",  # loader processes would compete with the ranks for the same cores
}
_NO_OTHER = {
    "--distributed-backend": "NCCL needs a GPU on every rank",
    "--transformer-impl": "Transformer Engine runs on GPUs only",
}


def add_flags(argv: list[str]) -> list[str]:
    """Return ``argv`` and those flags that a rehearsal needs and ``argv`` lacks; rank 0 prints them.

    Raises:
        S3Error: a flag in ``argv`` asks for what only a GPU can do.
    """
    given: dict[str, str] = {}
    for arg, following in itertools.pairwise([*argv, ""]):
        flag, equals, value = arg.partition("=")
        given[flag] = value if equals else following
    for flag, reason in _NO_OTHER.items():
        if given.get(flag, _NEEDED[flag]) != _NEEDED[flag]:
            raise S3Error(
                f"{flag} {given[flag]} cannot be rehearsed: {reason}; drop the flag (the rehearsal adds "
                f"{flag} {_NEEDED[flag]}), or run without --rehearsal on a machine with GPUs"
            )
    if "--async-save" in given:
        raise S3Error(
            "--async-save cannot be rehearsed: checkpoints are written by the ranks themselves; drop the flag"
        )
    added = [part for flag, value in _NEEDED.items() if flag not in given for part in (flag, value) if part]
    if added and is_first_rank():
        print(f"REHEARSAL adds: {' '.join(added)}", file=sys.stderr)
    return [*argv, *added]
