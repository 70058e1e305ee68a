"""DeepSpeed on CPUs, without what it would compile there."""

import functools
from collections.abc import Callable
from typing import Any

from s3_megatron.errors import S3Error
from s3_megatron.swap import SymbolSwap

_SHARED_MEMORY = "deepspeed_shm_comm"  # deepspeed 0.19.8, ops/op_builder/cpu/comm.py


def use_gloo() -> None:
    """Leave the collectives of ranks on CPUs to gloo; call it before DeepSpeed joins them.

    DeepSpeed would compile shared-memory ones when the first ranks start, which takes a minute or more, again whenever
    it is installed elsewhere; and if a rank is killed meanwhile, torch's lock file makes all later ranks wait for ever.

    Several weights of ZeRO-3 are gathered one by one before 0.19: it waits for the last of them alone, and gloo, which
    keeps no order, wrote others into place later, over what had been loaded there.

    Raises:
        S3Error: DeepSpeed has no such op any more.
    """
    import deepspeed  # not above: see __init__.py
    from deepspeed.runtime.zero.partition_parameters import Init

    operations = deepspeed.ops.__compatible_ops__
    if _SHARED_MEMORY not in operations:
        raise S3Error(
            f"this DeepSpeed has no op {_SHARED_MEMORY}: install a version from the table in docs/versions.md"
        )
    operations[_SHARED_MEMORY] = False
    if deepspeed.__version__.startswith(("0.17.", "0.18.")):
        SymbolSwap("this DeepSpeed").replace(Init, "_allgather_params_coalesced", _one_by_one)


def _one_by_one(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap the method of ``Init`` (deepspeed 0.17.6, runtime/zero/partition_parameters.py)."""

    @functools.wraps(original)
    def gather(self: Any, param_list: list[Any], *args: Any, **kwargs: Any) -> None:
        for param in param_list:
            original(self, [param], *args, **kwargs)

    return gather
