"""Turning ``--optimizer s3``, and whatever else the registry has, on in this process."""

from s3_megatron.engines.versions import MEGATRON, check
from s3_megatron.errors import S3Error
from s3_megatron.swap import SymbolSwap

_swap = SymbolSwap("this megatron-core")


def install() -> None:
    """Make Megatron accept ``--optimizer s3`` and ``--watch-dir``; does nothing the second time.

    Call it before Megatron parses its arguments. Other optimizers run as without it.

    Raises:
        S3Error: megatron-core is missing or fails at its import, is of a version known not to work, or lacks a symbol
            that S3 goes through.
    """
    if _swap.active:
        return
    _check_version()
    from megatron.core import optimizer as core

    try:
        # In a patched Megatron, which calls this at the end of megatron/training/__init__.py, `megatron` has no
        # attribute `training` yet.
        from megatron.training import arguments, initialize, training
    except ModuleNotFoundError as error:
        if error.name != "megatron.training":
            raise
        raise S3Error(
            f"this megatron-core comes without megatron.training, as the wheels before 0.17 do: install one of "
            f"{', '.join(MEGATRON.tested)}, or run from a Megatron-LM checkout"
        ) from None

    from s3_megatron.engines.megatron import config, factory, single_pass, watch

    # A patched Megatron calls install() itself, while the lines above import it.
    if _swap.active:
        return
    _swap.replace(arguments, "_add_training_args", config.add_flags)
    # 0.17's pretrain() parses the command line, by a name of its own for the function.
    parsers = [arguments, *([initialize] if hasattr(initialize, "validate_args") else [])]
    _swap.replace_in(parsers, "validate_args", config.validate)
    _swap.replace(training, "get_megatron_optimizer_config", config.make_config)
    _swap.replace(training, "training_log", watch.log_training)
    _swap.replace(training, "evaluate_and_print_results", watch.remember_evaluation)
    _swap.replace(training, "evaluate", watch.log_validation)
    host = core.optimizer
    _swap.replace(host, "clip_grad_by_total_norm_fp32", single_pass.clip_by_norm)
    _swap.replace(host, "get_grad_norm_fp32", single_pass.norm_of_unscaled)
    if hasattr(core.DistributedOptimizer, "optimizer_state_keys"):  # before 0.19 the two of Adam
        _swap.replace(core.DistributedOptimizer, "optimizer_state_keys", factory.state_keys)
    _swap.replace_in([core, training], "get_megatron_optimizer", factory.make_optimizer)


def uninstall() -> None:
    """Put Megatron's own functions back."""
    _swap.undo()


def _check_version() -> None:
    try:
        from megatron.core.package_info import __version__ as version
    except ImportError as error:
        what = "is not installed" if error.name in ("megatron", "megatron.core") else f"cannot be imported ({error})"
        raise S3Error(
            f"megatron-core {what}: pip install 's3-megatron[megatron]', or run from a Megatron-LM checkout"
        ) from error
    check(MEGATRON, version)
