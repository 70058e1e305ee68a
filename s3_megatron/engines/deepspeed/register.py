"""Making ``{"type": "S3"}`` an optimizer of DeepSpeed in this process."""

import sys

from s3_megatron.engines.swap import SymbolSwap
from s3_megatron.errors import S3Error

SUPPORTED = "0.19."  # deepspeed versions whose symbols were read

_swap = SymbolSwap("this DeepSpeed")


def register() -> None:
    """Make DeepSpeed accept ``{"optimizer": {"type": "S3"}}`` and S3 objects; does nothing the second time.

    Call it before ``deepspeed.initialize`` (or before ``transformers.Trainer`` or ``accelerate`` call that). Other
    optimizers run as without it, except that they refuse S3's checkpoints.

    Raises:
        S3Error: DeepSpeed is missing, of an unsupported version, or lacks a symbol that S3 goes through.
    """
    if _swap.active:
        return
    _check_version()
    import deepspeed.runtime.engine as host

    from s3_megatron.engines.deepspeed import build, stepping

    engine = host.DeepSpeedEngine
    _swap.replace(engine, "_is_supported_optimizer", build.is_supported_optimizer)
    _swap.replace(engine, "_configure_basic_optimizer", build.configure_basic_optimizer)
    _swap.replace(engine, "_configure_optimizer", build.configure_optimizer)
    _swap.replace(host, "is_zero_supported_optimizer", build.is_zero_supported_optimizer)
    _swap.replace(engine, "_take_model_step", stepping.take_model_step)
    # Importing accelerate takes seconds, so it is left alone where nobody has; build.py stops what then slips by.
    accelerate = sys.modules.get("accelerate.accelerator")
    if accelerate is not None:
        _swap.replace(accelerate, "map_pytorch_optim_to_deepspeed", build.keep_s3)


def unregister() -> None:
    """Put DeepSpeed's own functions back."""
    _swap.undo()


def _check_version() -> None:
    try:
        import deepspeed
    except ImportError:
        raise S3Error("DeepSpeed is not installed: pip install 's3-megatron[deepspeed]'") from None
    if not deepspeed.__version__.startswith(SUPPORTED):
        raise S3Error(
            f"deepspeed {deepspeed.__version__} is not supported: s3_megatron works with {SUPPORTED}x; install one of "
            "those"
        )
