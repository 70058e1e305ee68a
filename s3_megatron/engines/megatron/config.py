"""Optimizers' settings as Megatron carries them, made of their Specs: command-line flags and an OptimizerConfig."""

import argparse
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

from megatron.core.optimizer import DistributedOptimizer, OptimizerConfig
from megatron.core.package_info import __version__

from s3_megatron.engines.megatron import layer_wise
from s3_megatron.errors import S3Error
from s3_megatron.machine import is_first_rank
from s3_megatron.optim import registry
from s3_megatron.optim.spec import FROM_ADAM, NAMES, OVERRIDE, Spec, flag_of

logger = logging.getLogger(__name__)

_ADAMS = ("adam_beta1", "adam_beta2", "adam_eps")


class SpecOptimizerConfig(OptimizerConfig):
    """OptimizerConfig (megatron-core 0.17.1 to 0.19.2) with one optimizer's own fields; ``optimizer`` is its name.

    One of matrices has the fields of those that may move the rest, too.
    """

    spec: ClassVar[Spec]

    def asks(self, switch: str, spec: Spec) -> bool:
        """Whether FROM_ADAM or OVERRIDE is on for the optimizer ``spec`` in it."""
        return bool(getattr(self, spec.field(switch), False))


@functools.cache
def config_class(spec: Spec) -> type[SpecOptimizerConfig]:
    """Make the configuration of ``spec``, a dataclass with a field for each hyperparameter and switch."""
    own: list[tuple[str, Any, Any]] = [("optimizer", str, dataclasses.field(default=spec.name))]
    for one in (spec, *spec.beside):
        for each in (*one.hyperparameters, *one.engine):
            kind: Any = each.kind
            kind = tuple[kind, kind] if each.count > 1 else kind
            own.append((one.field(each.name), kind | None if each.default is None else kind, each.default))
        own += [(field, bool, False) for field in one.switch_fields]
    namespace = {"spec": spec, "__doc__": f"OptimizerConfig with {spec.title}'s hyperparameters."}
    made: type[SpecOptimizerConfig] = dataclasses.make_dataclass(
        f"{spec.title}Config", own, bases=(SpecOptimizerConfig,), namespace=namespace, module=__name__
    )
    return made


# Where pickle looks for them.
S3Config = config_class(registry.S3)
SoftSignumConfig = config_class(registry.SOFTSIGNUM)
SoftMuonConfig = config_class(registry.SOFTMUON)

# What no optimizer of ours can do in Megatron yet, by the argument that asks for it.
_UNSUPPORTED = {
    "use_precision_aware_optimizer": "its state and masters are float32; drop the flag",
    "optimizer_cpu_offload": "Megatron's offload knows Adam and SGD only; drop the flag",
    "optimizer_cuda_graph": "its step is not captured in a CUDA graph; drop the flag",
    "use_megatron_fsdp": "use --use-distributed-optimizer, which shards its state and masters",
    "use_torch_fsdp2": "use --use-distributed-optimizer, which shards its state and masters",
    "yaml_cfg": "pass its settings as flags",
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
        optimizer.choices = [*(optimizer.choices or ()), *(spec.name for spec in registry.specs())]
        for spec in registry.specs():
            _add_own(parser.add_argument_group(f"{spec.title} optimizer ({spec.source})"), spec)
        parser.add_argument_group("s3_megatron").add_argument(
            "--watch-dir",
            default=None,
            metavar="DIR",
            help="Append loss, rates and mean and max |update| to DIR/metrics.jsonl at every logged iteration, with "
            "any optimizer; with S3 and SoftSignum also the shares of |update| > 0.9 and of weights that move against "
            "their gradient, of which SoftMuon has the latter. Default: off.",
        )
        return parser

    return _add_training_args


def _add_own(group: Any, spec: Spec) -> None:
    """Add a flag for each hyperparameter of ``spec``, and for what it may be asked of a checkpoint."""
    for each in (*spec.hyperparameters, *spec.engine):
        text = f"{each.described[0].upper()}{each.described[1:]}. Default: {each.shown_default}."
        if each.kind is bool:
            flag = spec.flag(each.switch)
            negation = f"Do not {each.help}" if each.default else each.help.capitalize()
            action = f"store_{not each.default}".lower()
            group.add_argument(flag, dest=spec.field(each.name), action=action, help=f"{negation}.")
        elif each.count > 1:
            names = tuple(f"{each.name.removesuffix('s')}{i}".upper() for i in (1, 2))
            group.add_argument(spec.flag(each.name), type=each.kind, nargs=2, default=None, metavar=names, help=text)
        else:
            group.add_argument(spec.flag(each.name), type=each.kind, default=each.default, help=text)
    if spec.from_adam is not None:
        group.add_argument(
            spec.flag(FROM_ADAM),
            action="store_true",
            help=f"Turn a loaded Adam checkpoint's state into {spec.title}'s ({spec.from_adam_help}); implies "
            "--override-opt-param-scheduler, since the rates differ. Default: refuse it.",
        )
    group.add_argument(
        spec.flag(OVERRIDE),
        action="store_true",
        help=f"Resume although {' or '.join(spec.state_keys)} differ from the checkpoint's. Default: refuse.",
    )


def validate(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``megatron.training.arguments.validate_args`` (0.17.1 to 0.19.2).

    For every name but adam and sgd it turns ``use_distributed_optimizer`` off and the layer-wise optimizer on, so
    an element-wise optimizer goes through it by Adam's name; that of matrices is made for the other road.
    """

    @functools.wraps(original)
    def validate_args(args: argparse.Namespace, *rest: Any, **kwargs: Any) -> Any:
        spec = registry.find(args.optimizer)
        _name_ignored(args, [] if spec is None else layer_wise.used(spec, args))
        if spec is None:
            return original(args, *rest, **kwargs)
        refuse_unsupported(args)
        for one in layer_wise.used(spec, args):
            one.check(one.chosen(own_values(one, args)), one.flag)
        if getattr(args, spec.field(FROM_ADAM), False):
            args.override_opt_param_scheduler = True
        with nullcontext() if spec.beside else _by_adams_name(args):
            validated = original(args, *rest, **kwargs)
        # From here on the arguments are complete, for Megatron's optimizer and for DeepSpeed's; or refused.
        for one in layer_wise.used(spec, args):
            for name, value in one.complete(own_values(one, args), _iterations(args)).items():
                setattr(args, one.field(name), value)
        return validated

    return validate_args


def _name_ignored(args: argparse.Namespace, used: list[Spec]) -> None:
    """Say which flags have a value of their own and belong to optimizers that are not ``used``: they do nothing."""
    fields: dict[str, tuple[str, Any]] = {
        one.field(each.name): (one.flag(each.switch), each.default)
        for one in registry.specs()
        if one not in used
        for each in (*one.hyperparameters, *one.engine)
    }
    if used and not any(getattr(args, one.field("scalar_optimizer"), None) == "adam" for one in used):
        defaults = {field.name: field.default for field in dataclasses.fields(OptimizerConfig)}
        fields |= {name: (flag_of(name), defaults[name]) for name in _ADAMS}
    given = [flag for field, (flag, default) in fields.items() if getattr(args, field, default) != default]
    if given and is_first_rank():
        logger.warning(
            "of another optimizer, and without effect on --optimizer %s: %s", args.optimizer, ", ".join(given)
        )


def _iterations(args: argparse.Namespace) -> int | None:
    """Give the iterations of the run, also of one in --train-samples; None where the batch size grows.

    As ``update_train_iters`` of megatron.training.training (0.17.1 to 0.19.2), which the host calls later.
    """
    if args.train_iters:
        return int(args.train_iters)
    grows = args.rampup_batch_size is not None or getattr(args, "step_batch_size_schedule", None) is not None
    return None if grows or not args.train_samples else int(args.train_samples // args.global_batch_size)


def own_values(spec: Spec, settings: argparse.Namespace | OptimizerConfig) -> dict[str, Any]:
    """Give the hyperparameters of ``spec``, by name, as flags or a configuration have them."""
    return {each.name: getattr(settings, spec.field(each.name)) for each in spec.hyperparameters}


@contextmanager
def _by_adams_name(args: argparse.Namespace) -> Iterator[None]:
    name, args.optimizer = args.optimizer, "adam"
    try:
        yield
    finally:
        args.optimizer = name


def refuse_unsupported(settings: argparse.Namespace | OptimizerConfig) -> None:
    """Raise S3Error for a setting, a flag or one of OptimizerConfig's, under which Megatron would not use ours.

    So it does for a value that the road of ``spec.engine`` does not have: no class checks these.
    """
    for name, fix in _UNSUPPORTED.items():
        if getattr(settings, name, None):
            raise S3Error(f"{flag_of(name)} does not work with --optimizer {settings.optimizer}: {fix}")
    spec = registry.find(settings.optimizer)
    if spec is None:
        return
    for each in spec.engine:
        each.check(getattr(settings, spec.field(each.name)), spec.flag(each.name))
    if spec.beside:
        layer_wise.refuse(settings)
    elif (
        settings.use_distributed_optimizer
        and spec.state_names != NAMES
        and not hasattr(DistributedOptimizer, "optimizer_state_keys")  # 0.19's
    ):
        raise S3Error(
            f"megatron-core {__version__} saves {' and '.join(NAMES)} of every optimizer, and {spec.title} has "
            f"{' and '.join(spec.state_names)} alone: install 0.19, or go without --use-distributed-optimizer"
        )


def make_config(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``megatron.training.training.get_megatron_optimizer_config`` (0.17.1 to 0.19.2).

    0.17 refuses the names of optimizers that it does not know.
    """

    @functools.wraps(original)
    def get_megatron_optimizer_config(args: argparse.Namespace) -> tuple[OptimizerConfig, Any]:
        spec = registry.find(args.optimizer)
        if spec is None:
            return original(args)
        with _by_adams_name(args):
            config, overrides = original(args)
        stock = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.init}
        own: dict[str, Any] = {}
        for each in (spec, *spec.beside):
            names = (*own_values(each, args), *(one.name for one in each.engine))
            own |= {field: getattr(args, field) for field in (*map(each.field, names), *each.switch_fields)}
        return config_class(spec)(**{**stock, **own, "optimizer": spec.name}), overrides

    return get_megatron_optimizer_config
