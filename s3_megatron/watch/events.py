"""What a line of a metrics file says: typed here, flat JSON there. Imports no torch."""

import json
import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

EvaluationKind = Literal["validation", "test"]


@dataclass(frozen=True)
class Updates:
    """Sizes of an optimizer's last updates u, in units of the learning rate and without decay; None is not known.

    ``saturated`` is the share of elements with |u| > 0.9. ``agreement`` is the share whose update has the sign of
    their own gradient, so that the step moves the weight against it (under ``maximize``: along it).
    """

    mean: float | None = None
    max: float | None = None
    saturated: float | None = None
    agreement: float | None = None

    def named(self) -> dict[str, float | None]:
        """Give them by their names in a line."""
        return {f"update_{each.name}": getattr(self, each.name) for each in fields(self)}


@dataclass(frozen=True)
class Optimizer:
    """What is trained, once a start: bytes are the worst rank's, per parameter of its model (or model shard).

    ``shard_elements`` is what each rank's optimizers move; ``parameters`` the last rank's model.
    """

    name: str
    wrapper: str
    world_size: int
    parameters: int
    shard_elements: list[int]
    state_bytes_per_param_rank: float
    master_bytes_per_param_rank: float


@dataclass(frozen=True)
class Train:
    """One logged iteration.

    ``seconds`` is the mean time of an iteration since the line before; None in the first line of a start.
    ``updates`` are of all optimizers together, ``optimizers`` those of each by name, where there are several.
    """

    iteration: int
    losses: dict[str, float] = field(default_factory=dict)
    lr: float | None = None
    grad_norm: float | None = None
    skipped: bool = False
    updates: Updates = Updates()
    seconds: float | None = None
    optimizers: dict[str, Updates] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """Losses on data that is not trained on."""

    kind: EvaluationKind
    iteration: int
    losses: dict[str, float] = field(default_factory=dict)


Event = Optimizer | Train | Evaluation

# What a loss cannot be called.
RESERVED = {
    "event",
    *Updates().named(),
    *(each.name for each in fields(Train) if each.name not in ("losses", "updates")),
}


def encode(event: Event) -> str:
    """Write ``event`` as one line of JSON that every parser takes: a number that is not finite becomes a string."""
    match event:
        case Optimizer():
            line: dict[str, Any] = {"event": "optimizer", **vars(event)}
        case Train():
            line = {
                "event": "train",
                "iteration": event.iteration,
                **event.losses,
                "lr": event.lr,
                "grad_norm": event.grad_norm,
                "skipped": event.skipped,
                **event.updates.named(),
                "seconds": event.seconds,
            }
            if event.optimizers:
                line["optimizers"] = {
                    name: {key: _finite(value) for key, value in updates.named().items()}
                    for name, updates in event.optimizers.items()
                }
        case Evaluation():
            line = {"event": event.kind, "iteration": event.iteration, **event.losses}
    return json.dumps({name: _finite(value) for name, value in line.items()}, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def decode(line: bytes | str) -> Event | None:
    """Read one line; None where it is torn, no event, or of a kind that this version does not know.

    A number that no field has the name of is taken for a loss.
    """
    try:
        found = json.loads(line)
        kind = found.pop("event")
        if kind == "optimizer":
            return Optimizer(**{each.name: found[each.name] for each in fields(Optimizer)})
        if kind == "train":
            return _train(found)
        if kind in get_args(EvaluationKind):
            return Evaluation(kind, _iteration(found), _losses(found))
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        pass
    return None


def _train(found: dict[str, Any]) -> Train:
    iteration, updates = _iteration(found), _updates(found)
    several = found.pop("optimizers", {})
    lr, grad_norm, seconds = (_number(found.pop(name, None)) for name in ("lr", "grad_norm", "seconds"))
    return Train(
        iteration=iteration,
        lr=lr,
        grad_norm=grad_norm,
        skipped=bool(found.pop("skipped", False)),
        updates=updates,
        seconds=seconds,
        optimizers={name: _updates(each) for name, each in several.items()},
        losses=_losses(found),
    )


def _updates(found: dict[str, Any]) -> Updates:
    return Updates(**{each.name: _number(found.pop(f"update_{each.name}", None)) for each in fields(Updates)})


def _iteration(found: dict[str, Any]) -> int:
    iteration = found.pop("iteration")
    if type(iteration) is not int:
        raise TypeError("an iteration is an integer")
    return iteration


def _losses(found: dict[str, Any]) -> dict[str, float]:
    read = {name: _number(value) for name, value in found.items()}
    return {name: value for name, value in read.items() if value is not None}


def _number(value: Any) -> float | None:
    """Read a number, or what ``encode`` makes of one that is not finite; anything else is None."""
    if type(value) in (int, float) or value in ("NaN", "Infinity", "-Infinity"):
        return float(value)
    return None
