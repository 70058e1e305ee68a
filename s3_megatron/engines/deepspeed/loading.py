"""Loading checkpoints into an engine with S3 where DeepSpeed leaves weights out, or takes them from elsewhere.

Every host symbol named here was read in deepspeed 0.19.8, runtime/engine.py.
"""

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from deepspeed.utils import log_dist

from s3_megatron.engines.deepspeed import untrained
from s3_megatron.errors import S3Error
from s3_megatron.optim import EngineOptimizer, registry

# What of a configuration computes nothing.
_BESIDE = (
    *("steps_per_print", "wall_clock_breakdown", "dump_state", "memory_breakdown", "tensorboard", "wandb", "comet"),
    *("csv_monitor", "monitor_config", "flops_profiler", "comms_logger", "checkpoint", "aio"),
)


def load_checkpoint(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``DeepSpeedEngine.load_checkpoint``.

    Raises:
        S3Error: the engine has S3, and DeepSpeed would load no weights, or those of another checkpoint.
    """
    signature = inspect.signature(original)

    @functools.wraps(original)
    def load_checkpoint(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(getattr(self, "basic_optimizer", None), EngineOptimizer):
            return original(self, *args, **kwargs)
        call = signature.bind(self, *args, **kwargs)
        call.apply_defaults()
        universal = self.load_universal_checkpoint()
        if self.zero_optimization_partition_weights() and not universal and not self.has_moe_layers:
            _check_zero_3(call.arguments)
        loaded = original(self, *args, **kwargs)
        if universal and loaded[0] is not None:
            untrained.load(self, _folder(call.arguments, "latest_universal"))
        if isinstance(saved := (loaded[1] or {}).get("ds_config"), dict):
            _log_changes(dict(leaves(saved)), dict(leaves(self.config)))
        return loaded

    return load_checkpoint


def _log_changes(saved: dict[str, Any], ours: dict[str, Any]) -> None:
    """Log on rank 0 in what the configuration differs from the checkpoint's, which DeepSpeed keeps and compares not."""
    beside = (*_BESIDE, *_compared_with_the_state())
    changes = [
        f"{key} {saved.get(key, 'not given')}, here {ours.get(key, 'not given')}"
        for key in dict.fromkeys((*saved, *ours))
        if saved.get(key) != ours.get(key) and not any(f"{key}.".startswith(f"{name}.") for name in beside)
    ]
    if changes:
        log_dist(
            f"this run goes on from a checkpoint of another DeepSpeed configuration: {'; '.join(changes)}",
            ranks=[0],
            level=logging.WARNING,
        )


def _compared_with_the_state() -> list[str]:
    """List the keys that are compared, group by group, where the optimizer's state is loaded."""
    names = ["weight_decay"]
    for spec in registry.specs():
        names += [each.name for each in spec.hyperparameters if each.defines_state]
        names += [*spec.road, *spec.switch_fields]
    return [f"optimizer.params.{name}" for name in names]


def leaves(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value of ``config`` by its key with those around it; a file has 0 for 0.0, which are equal."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _folder(asked: dict[str, Any], latest: str) -> Path:
    """Give the folder of the checkpoint that a call of ``load_checkpoint`` asks for."""
    folder = Path(asked["load_dir"])
    return folder / (asked["tag"] or (folder / latest).read_text(encoding="utf-8").strip())


def _check_zero_3(asked: dict[str, Any]) -> None:
    """Raise S3Error where ``_load_checkpoint`` in ZeRO-3 would not load the weights of the checkpoint asked for."""
    if asked["load_optimizer_states"]:
        if asked["load_module_only"]:
            raise S3Error(
                "load_module_only=True loads no weights in ZeRO-3, with any optimizer: give "
                "load_optimizer_states=False instead"
            )
        return
    latest = Path(asked["load_dir"]) / "latest"
    named = latest.read_text(encoding="utf-8").strip() if latest.is_file() else None
    if named is None or asked["tag"] not in (None, named):
        raise S3Error(
            f"without optimizer states ZeRO-3 takes the weights of the checkpoint that {latest} names "
            f"({named or 'there is no such file'}), whatever the tag, with any optimizer: write "
            f"{asked['tag'] or 'the tag'} into that file"
        )
