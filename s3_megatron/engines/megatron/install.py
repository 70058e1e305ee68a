"""Turning ``--optimizer s3`` on in this process."""

import functools

from s3_megatron.engines.swap import SymbolSwap
from s3_megatron.errors import S3Error

SUPPORTED = "0.19."  # megatron-core versions whose symbols were read

_swap = SymbolSwap("this megatron-core")


def install() -> None:
    """Make Megatron accept ``--optimizer s3`` and ``--watch-dir``; does nothing the second time.

    Call it before Megatron parses its arguments. Other optimizers run as without it.

    Raises:
        S3Error: megatron-core is missing, of an unsupported version, or lacks a symbol that S3 goes through.
    """
    if _swap.active:
        return
    _check_version()
    import megatron.core.optimizer.optimizer
    import megatron.training.arguments
    import megatron.training.training

    from s3_megatron.engines.megatron import config, factory, metrics, single_pass

    _swap.replace(megatron.training.arguments, "_add_training_args", config.add_flags)
    _swap.replace(megatron.training.arguments, "validate_args", config.validate)
    _swap.replace(megatron.training.training, "get_megatron_optimizer_config", config.make_config)
    _swap.replace(megatron.training.training, "training_log", metrics.log_training)
    _swap.replace(megatron.training.training, "evaluate_and_print_results", metrics.remember_evaluation)
    _swap.replace(megatron.training.training, "evaluate", metrics.log_validation)
    host = megatron.core.optimizer.optimizer
    _swap.replace(host, "clip_grad_by_total_norm_fp32", single_pass.clip_by_norm)
    _swap.replace(host, "get_grad_norm_fp32", single_pass.norm_of_unscaled)
    # Both modules hold the name; one wrapper serves both.
    make_optimizer = functools.cache(factory.make_optimizer)
    _swap.replace(megatron.core.optimizer, "get_megatron_optimizer", make_optimizer)
    _swap.replace(megatron.training.training, "get_megatron_optimizer", make_optimizer)


def uninstall() -> None:
    """Put Megatron's own functions back."""
    _swap.undo()


def _check_version() -> None:
    try:
        from megatron.core.package_info import __version__ as version
    except ImportError:
        raise S3Error(
            "megatron-core is not installed: pip install 's3-megatron[megatron]', or run from a Megatron-LM checkout"
        ) from None
    if not version.startswith(SUPPORTED):
        raise S3Error(
            f"megatron-core {version} is not supported: s3_megatron works with {SUPPORTED}x; install one of those"
        )
