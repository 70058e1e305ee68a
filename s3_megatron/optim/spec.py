"""The form of a Spec: what flags, settings, fields and checks of an optimizer are made from. Imports no torch."""

import functools
import importlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any

from s3_megatron.errors import S3Error

if TYPE_CHECKING:
    from torch import Tensor

    from s3_megatron.optim.engine_optimizer import EngineOptimizer


# Megatron-LM and DeepSpeed find optimizer state in their checkpoints by Adam's two names.
NAMES = ("exp_avg", "exp_avg_sq")
_HOSTS_OWN = ("adam", "adamw", "sgd", "lion", "muon")

# Beside the hyperparameters, what a start may ask of a checkpoint: to convert Adam's state, and to go on with this
# run's values of what defines the state.
FROM_ADAM, OVERRIDE = "from_adam", "override_hyperparameters"


def flag_of(name: str) -> str:
    """Spell Megatron's argument ``name`` as its flag."""
    return f"--{name.replace('_', '-')}"


@dataclass(frozen=True)
class Range:
    """Numbers from ``low``, or above it, to below ``high``, or to it; infinity only as a bound that is included."""

    low: float
    high: float = math.inf
    includes_low: bool = True
    includes_high: bool = False

    def holds(self, value: float) -> bool:
        """Whether ``value`` is in it; NaN is not."""
        if value == self.low:
            return self.includes_low
        return self.low < value < self.high or (self.includes_high and value == self.high)

    def __str__(self) -> str:
        """As help texts and documents have it."""
        if self.high == math.inf:
            return f"{'>=' if self.includes_low else '>'} {self.low:g}"
        return f"in {'[' if self.includes_low else '('}{self.low:g}, {self.high:g}{']' if self.includes_high else ')'}"


@dataclass(frozen=True)
class Hyperparameter:
    """One argument of an optimizer, which is also a flag, a field, a param and a recipe's key.

    Attributes:
        name: the argument's.
        default: its value where none is given; None: another hyperparameter of the same ``key`` counts, or what
            ``Spec.complete`` makes of the others.
        help: one clause without its range and default, and whatever else behind a semicolon.
        kind: float, int, bool or str.
        count: how many values it has: 1, or 2 for a pair.
        range: which numbers are allowed.
        choices: which texts are.
        defines_state: whether a state that was made with another value means something else, or its run took other
            steps than this one would.
        key: its name in the param groups, where that is not ``name``.
        hint: a value that is right, for who gave a wrong one.
    """

    name: str
    default: float | bool | str | None
    help: str
    kind: type = float
    count: int = 1
    range: Range | None = None
    choices: tuple[str, ...] = ()
    defines_state: bool = False
    key: str = ""
    hint: str = ""

    def __post_init__(self) -> None:
        """Take the name for the key where none is given."""
        object.__setattr__(self, "key", self.key or self.name)

    @property
    def switch(self) -> str:
        """What its flag is called: that of a bool is for the other value than the default."""
        return f"no_{self.name}" if self.kind is bool and self.default else self.name

    @property
    def described(self) -> str:
        """The help with its range or choices."""
        clause, semicolon, rest = self.help.partition(";")
        allowed = (
            f", {self.range}" if self.range is not None else f": {', '.join(self.choices)}" if self.choices else ""
        )
        return f"{clause}{allowed}{semicolon}{rest}"

    @property
    def shown_default(self) -> str:
        """The default as help texts and documents have it."""
        return "none" if self.default is None else f"{self.default:{'' if self.kind is str else 'g'}}"

    def check(self, value: Any, label: str) -> None:
        """Raise S3Error with ``label``, what the user calls it, for a value that is not allowed."""
        hint = f"; {self.hint}" if self.hint else ""
        values = value if self.count > 1 else (value,)
        if not isinstance(values, tuple | list) or len(values) != self.count:
            raise S3Error(f"{label} is {value!r}: it must be a pair of numbers{hint}")
        for one in values:
            if self.kind is bool and one not in (True, False):
                raise S3Error(f"{label} is {one!r}: it must be true or false")
            if self.choices and one not in self.choices:
                raise S3Error(f"{label} is {one!r}: it must be one of {', '.join(self.choices)}{hint}")
            if self.range is None:
                continue
            if isinstance(one, str | list | tuple | dict):
                raise S3Error(f"{label} is {one!r}: it must be a number{hint}")
            whole = isinstance(one, Integral) and not isinstance(one, bool)
            if not self.range.holds(one) or (self.kind is int and not whole):
                kind = "number" if self.range.includes_high else "finite number"
                kind = "whole number" if self.kind is int else kind
                subject = "it" if self.count == 1 else "both"
                allowed = f"be a {kind} {self.range}" if self.range.high == math.inf else f"lie {self.range}"
                raise S3Error(f"{label} is {value}: {subject} must {allowed}{hint}")


# What every optimizer has; their values are the scheduler's, and never the state's.
LR = Hyperparameter("lr", 1e-3, "Learning rate", range=Range(0))
WEIGHT_DECAY = Hyperparameter("weight_decay", 0.0, "Decoupled weight decay", range=Range(0))


@dataclass(frozen=True, eq=False)
class Spec:
    """What the engines, the entries and the jobs know of an optimizer.

    Attributes:
        name: in small letters, as Megatron's ``--optimizer`` has it; the prefix of its flags and fields.
        optimizer: its class, an EngineOptimizer, as "module:name"; the name is DeepSpeed's ``type``.
        source: where it was published.
        state: its state tensors, by one or two of Adam's names, by which both hosts find state, and what is in each.
        hyperparameters: its arguments beside ``lr`` and ``weight_decay``.
        beside: of an optimizer of matrices the element-wise ones that may take the rest of a model; else none.
        engine: what Megatron's road for such an optimizer is asked, and the class is not.
        road: entries of a param group that an engine, or a user, puts there, and that are compared at a resume as
            hyperparameters are that define the state, where both the checkpoint and the run have them.
        complete: gives the values, by name, with what follows from the length of the host's run in steps, or None;
            raises S3Error for values that do not go together.
        from_adam: makes a parameter's state of its Adam state; None: there is no such conversion.
        from_adam_help: the same in a clause.

    What else a checkpoint must hold, a counter or a schedule's numbers, is in the param groups: hosts save and load
    these as they are.
    """

    name: str
    optimizer: str
    source: str
    state: Mapping[str, str]
    hyperparameters: tuple[Hyperparameter, ...]
    complete: Callable[[Mapping[str, Any], int | None], Mapping[str, Any]] = lambda values, steps: values
    from_adam: "Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None" = None
    from_adam_help: str = ""
    beside: "tuple[Spec, ...]" = ()
    engine: tuple[Hyperparameter, ...] = ()
    road: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raise S3Error for what the hosts would not find, or would take for their own."""
        if not re.fullmatch("[a-z][a-z0-9]*", self.name) or self.name in _HOSTS_OWN:
            raise S3Error(
                f"a Spec has the name {self.name!r}: it must be small letters and digits, and none of the hosts' own "
                f"({', '.join(_HOSTS_OWN)})"
            )
        if tuple(self.state) not in (NAMES[:1], NAMES):
            raise S3Error(
                f"the Spec {self.name} has the state {', '.join(self.state) or '(none)'}: it must be {NAMES[0]}, or "
                f"{' and '.join(NAMES)}, by which both hosts find state"
            )

    @property
    def title(self) -> str:
        """The class's name."""
        return self.optimizer.partition(":")[2]

    @functools.cached_property
    def state_names(self) -> tuple[str, ...]:
        """The names of the state tensors."""
        return tuple(self.state)

    @functools.cached_property
    def state_format(self) -> str:
        """What every param group has under ``mark``; another text is another state."""
        return ", ".join(f"{name}={what}" for name, what in self.state.items())

    @functools.cached_property
    def mark(self) -> str:
        """The entry of every param group that says whose state it is."""
        return f"{self.name}_state"

    @functools.cached_property
    def state_keys(self) -> tuple[str, ...]:
        """The entries of a param group that define the state."""
        return tuple(dict.fromkeys(each.key for each in self.hyperparameters if each.defines_state))

    @property
    def switches(self) -> tuple[str, ...]:
        """Those of FROM_ADAM and OVERRIDE that it has."""
        return (OVERRIDE,) if self.from_adam is None else (FROM_ADAM, OVERRIDE)

    @property
    def switch_fields(self) -> tuple[str, ...]:
        """The switches as arguments and fields."""
        return tuple(map(self.field, self.switches))

    def load(self) -> "type[EngineOptimizer]":
        """Import the class."""
        module, _, name = self.optimizer.partition(":")
        found: type[EngineOptimizer] = getattr(importlib.import_module(module), name)
        return found

    def flag(self, name: str) -> str:
        """Spell a hyperparameter, or a switch, as Megatron's flag."""
        return flag_of(self.field(name))

    def field(self, name: str) -> str:
        """Spell a hyperparameter, or a switch, as Megatron's argument and as the configuration's field."""
        return f"{self.name}_{name}"

    def chosen(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Leave of ``values``, by name, those that count: a pair of betas makes their one beta count no more."""
        given = {each: values[each.name] for each in self.hyperparameters if values[each.name] is not None}
        optional = {each.key for each in given if each.default is None}
        return {each.name: value for each, value in given.items() if each.default is None or each.key not in optional}

    def check(self, values: Mapping[str, Any], label: Callable[[str], str] = str) -> None:
        """Check those of ``values``, by name or by param group's key, that are there and not None.

        Raises:
            S3Error: one is out of range; ``label`` makes what the user calls it of its name.
        """
        for each, value in self._present(values):
            each.check(value, label(each.name))

    def _present(self, values: Mapping[str, Any]) -> Iterator[tuple[Hyperparameter, Any]]:
        for each in (LR, WEIGHT_DECAY, *self.hyperparameters):
            value = values.get(each.name)
            if value is None and each.key != each.name:
                # In a param group the one beta is a pair of equals, and is to be called what the user gave.
                pair = values.get(each.key)
                if isinstance(pair, tuple | list) and len(pair) == 2 and len({*pair}) == 1:
                    value = pair[0]
            if value is not None:
                yield each, value
