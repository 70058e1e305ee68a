"""S3's settings as Megatron carries them: command-line flags and an OptimizerConfig."""

import argparse
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig

from s3_megatron.errors import S3Error


@dataclass
class S3OptimizerConfig(OptimizerConfig):
    """OptimizerConfig (megatron-core 0.17.1 to 0.19.2) with S3's own hyperparameters; ``optimizer`` is "s3"."""

    optimizer: str = "s3"
    s3_beta: float = 0.95
    s3_p: float = 3.0
    s3_betas: tuple[float, float] | None = None
    s3_nesterov: bool = True
    s3_from_adam: bool = False
    s3_override_hyperparameters: bool = False

    def finalize(self) -> None:
        """Derive again what follows from the fields; Megatron-Bridge (0.6.2) changes some and then calls this."""
        self.__post_init__()

    def provide(self, model_chunks: list[Any], **settings: Any) -> MegatronOptimizer:
        """Build S3 for ``model_chunks``: Megatron-Bridge (0.6.2, training/optim.py) asks a config that can.

        ``settings`` are those of ``megatron.core.optimizer.get_megatron_optimizer``. Installs S3 in this process.
        """
        import megatron.core.optimizer as host

        from s3_megatron.engines.megatron.install import install  # imports this module

        install()
        optimizer: MegatronOptimizer = host.get_megatron_optimizer(self, model_chunks, **settings)
        return optimizer


# What S3 cannot do in Megatron yet, by the argument that asks for it.
_UNSUPPORTED = {
    "use_precision_aware_optimizer": "S3 keeps float32 state and masters; drop the flag",
    "optimizer_cpu_offload": "Megatron's offload knows Adam and SGD only; drop the flag",
    "optimizer_cuda_graph": "S3's step is not captured in a CUDA graph; drop the flag",
    "use_megatron_fsdp": "use --use-distributed-optimizer, which shards S3's state and masters",
    "use_torch_fsdp2": "use --use-distributed-optimizer, which shards S3's state and masters",
    "yaml_cfg": "pass S3's settings as flags",
}


class _Formatter(argparse.HelpFormatter):
    """Shows a help text that argparse cannot fill in as it is: one of megatron-core 0.19.2's has a bare %.

    That is --moe-paged-stash-buffer-size-factor-cuda's; with it, --help of a whole entry ended in a ValueError.
    """

    def _expand_help(self, action: argparse.Action) -> str:
        try:
            return super()._expand_help(action)
        except (KeyError, TypeError, ValueError):
            return action.help or ""


def add_flags(original: Callable[..., argparse.ArgumentParser]) -> Callable[..., argparse.ArgumentParser]:
    """Wrap ``megatron.training.arguments._add_training_args`` (0.17.1 to 0.19.2), which defines ``--optimizer``."""

    @functools.wraps(original)
    def _add_training_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser.formatter_class = _Formatter
        parser = original(parser)
        # Megatron's usage is hundreds of lines, which would bury the one line that says what is wrong.
        parser.usage = "%(prog)s [Megatron flags; --help lists them]"
        optimizer = next(action for action in parser._actions if "--optimizer" in action.option_strings)
        optimizer.choices = [*(optimizer.choices or ()), "s3"]
        group = parser.add_argument_group("S3 optimizer (arXiv 2507.06464)")
        group.add_argument("--s3-beta", type=float, default=0.95, help="Decay of m and s, in [0, 1). Default: 0.95.")
        group.add_argument("--s3-p", type=float, default=3.0, help="Exponent of the denominator, >= 1. Default: 3.")
        group.add_argument(
            "--s3-betas",
            type=float,
            nargs=2,
            default=None,
            metavar=("BETA1", "BETA2"),
            help="Decays of m and of s apart, for ablations; overrides --s3-beta. Default: none.",
        )
        group.add_argument(
            "--s3-no-nesterov",
            dest="s3_nesterov",
            action="store_false",
            help="No look-ahead. Default: look ahead.",
        )
        group.add_argument(
            "--s3-from-adam",
            action="store_true",
            help="Turn a loaded Adam checkpoint's state into S3's (m as is, r = sqrt(v)); implies "
            "--override-opt-param-scheduler, since the rates differ. Default: refuse it.",
        )
        group.add_argument(
            "--s3-override-hyperparameters",
            action="store_true",
            help="Resume although beta, p or nesterov differ from the checkpoint's. Default: refuse.",
        )
        group.add_argument(
            "--watch-dir",
            default=None,
            metavar="DIR",
            help="Append loss, rates and mean and max |update| to DIR/metrics.jsonl at every logged iteration, with "
            "any optimizer; with S3 also the shares of |update| > 0.9 and of weights that move against their gradient. "
            "Default: off.",
        )
        return parser

    return _add_training_args


def validate(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``megatron.training.arguments.validate_args`` (0.17.1 to 0.19.2).

    For every name but adam and sgd it turns ``use_distributed_optimizer`` off and the layer-wise optimizer on, so
    S3 goes through it by Adam's name, which asks for the element-wise road.
    """

    @functools.wraps(original)
    def validate_args(args: argparse.Namespace, *rest: Any, **kwargs: Any) -> Any:
        if args.optimizer != "s3":
            return original(args, *rest, **kwargs)
        _check(args)
        if args.s3_from_adam:
            args.override_opt_param_scheduler = True
        with _by_adams_name(args):
            return original(args, *rest, **kwargs)

    return validate_args


@contextmanager
def _by_adams_name(args: argparse.Namespace) -> Iterator[None]:
    args.optimizer = "adam"
    try:
        yield
    finally:
        args.optimizer = "s3"


def _check(args: argparse.Namespace) -> None:
    """Raise S3Error for what S3 cannot do, before any rank has built anything."""
    refuse_unsupported(args)
    for beta in args.s3_betas or (args.s3_beta,):
        if not 0 <= beta < 1:
            raise S3Error(f"--s3-beta{'s' if args.s3_betas else ''} has {beta}: every beta must lie in [0, 1)")
    if not 1 <= args.s3_p < float("inf"):
        raise S3Error(f"--s3-p is {args.s3_p}: it must be a finite number >= 1; 3 is the paper's")


def refuse_unsupported(settings: argparse.Namespace | S3OptimizerConfig) -> None:
    """Raise S3Error for a setting, a flag or one of OptimizerConfig's, under which Megatron would not use S3."""
    for name, fix in _UNSUPPORTED.items():
        if getattr(settings, name, None):
            raise S3Error(f"--{name.replace('_', '-')} does not work with --optimizer s3: {fix}")


def make_config(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``megatron.training.training.get_megatron_optimizer_config`` (0.17.1 to 0.19.2).

    0.17 refuses the names of optimizers that it does not know.
    """

    @functools.wraps(original)
    def get_megatron_optimizer_config(args: argparse.Namespace) -> tuple[OptimizerConfig, Any]:
        if args.optimizer != "s3":
            return original(args)
        with _by_adams_name(args):
            config, overrides = original(args)
        stock = {field.name: getattr(config, field.name) for field in fields(config) if field.init}
        s3 = {name: value for name, value in vars(args).items() if name in S3OptimizerConfig.__annotations__}
        return S3OptimizerConfig(**{**stock, **s3}), overrides

    return get_megatron_optimizer_config
