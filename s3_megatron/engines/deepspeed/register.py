"""Making ``{"type": "S3"}`` an optimizer of DeepSpeed in this process."""

import sys

from s3_megatron.engines import versions
from s3_megatron.engines.deepspeed.hugging_face import TrainerConfig
from s3_megatron.errors import S3Error
from s3_megatron.swap import SymbolSwap

_swap = SymbolSwap("this DeepSpeed")
_trainer = TrainerConfig()


def register() -> None:
    """Make DeepSpeed accept ``{"optimizer": {"type": "S3"}}`` and S3 objects; does nothing the second time.

    Call it before ``deepspeed.initialize`` (or before ``transformers.Trainer`` or ``accelerate`` call that). Other
    optimizers run as without it, except that they refuse S3's checkpoints.

    Raises:
        S3Error: DeepSpeed is missing or fails at its import, is of a version known not to work, or lacks a symbol that
            S3 goes through.
    """
    if _swap.active:
        return
    version = _version()
    if _swap.active:  # a patched DeepSpeed registers S3 at the end of its import, which was here
        return
    versions.check(versions.DEEPSPEED, version)
    import deepspeed.runtime.engine as host
    from deepspeed.ops.op_builder.builder import OpBuilder

    from s3_megatron.engines.deepspeed import build, builds, loading, schedule, stepping

    engine = host.DeepSpeedEngine
    _swap.replace(engine, "_is_supported_optimizer", build.is_supported_optimizer)
    _swap.replace(engine, "_configure_basic_optimizer", build.configure_basic_optimizer)
    _swap.replace(engine, "_configure_optimizer", build.configure_optimizer)
    _swap.replace(host, "is_zero_supported_optimizer", build.is_zero_supported_optimizer)
    _swap.replace(engine, "_configure_lr_scheduler", schedule.configure_lr_scheduler)
    _swap.replace(engine, "_take_model_step", stepping.take_model_step)
    _swap.replace(engine, "load_checkpoint", loading.load_checkpoint)
    _swap.replace(OpBuilder, "jit_load", builds.jit_load)
    # Importing accelerate takes seconds, so it is not imported here; build.py stops what then slips by.
    accelerate = sys.modules.get("accelerate.accelerator")
    if accelerate is not None:
        _swap.replace(accelerate, "map_pytorch_optim_to_deepspeed", build.keep_ours)
    _trainer.watch()


def unregister() -> None:
    """Put DeepSpeed's own functions back."""
    _trainer.leave()
    _swap.undo()


def _version() -> str:
    try:
        import deepspeed
    except ImportError as error:
        what = "is not installed" if error.name == "deepspeed" else f"cannot be imported ({error})"
        raise S3Error(f"DeepSpeed {what}: pip install 's3-megatron[deepspeed]'") from error
    return str(deepspeed.__version__)
