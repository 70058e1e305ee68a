"""DeepSpeed on CPUs, without what it would compile there."""

from s3_megatron.errors import S3Error

_SHARED_MEMORY = "deepspeed_shm_comm"  # deepspeed 0.19.8, ops/op_builder/cpu/comm.py


def use_gloo() -> None:
    """Leave the collectives of ranks on CPUs to gloo; call it before DeepSpeed joins them.

    DeepSpeed would compile shared-memory ones when the first ranks start, which takes a minute or more, again whenever
    it is installed elsewhere; and if a rank is killed meanwhile, torch's lock file makes all later ranks wait for ever.

    Raises:
        S3Error: DeepSpeed has no such op any more.
    """
    import deepspeed  # not above: see __init__.py

    operations = deepspeed.ops.__compatible_ops__
    if _SHARED_MEMORY not in operations:
        raise S3Error(f"this DeepSpeed has no op {_SHARED_MEMORY}: install a version from the README's table")
    operations[_SHARED_MEMORY] = False
