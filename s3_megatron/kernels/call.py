"""What a kernel is called with: tensors by what is in them, the numbers of the update, and what one step has beside."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from s3_megatron.errors import S3Error
from s3_megatron.kernels.formats import Format, find
from s3_megatron.watch.statistics import FIELDS

type Kind = Literal["weight", "gradient", "m", "r", "model weight"]
type Role = Literal["in", "in-out", "out"]

# What a step takes of each parameter, and what it does with it: read, read and write, or write. In the order of every
# table of addresses, S3Row of cpu/step.h included.
ROLES: dict[Kind, Role] = {"weight": "in-out", "gradient": "in", "m": "in-out", "r": "in-out", "model weight": "out"}
GRADIENTS = list(ROLES).index("gradient")
STATES: tuple[Kind, ...] = ("m", "r")


# Not frozen, and the two below not dataclasses: in a step of one small tensor what they take to be made would be seen.
@dataclass(slots=True)
class Columns:
    """The tensors of a step: lists of one length, one a kind; a row is one parameter's.

    Args:
        lists: by kind, in the order of ``ROLES``. Weights, gradients and m are always there; model weights, the
            low-precision copies to which new weights are written too, may be left out, and r is, with SoftSignum.
        format: the name of the states' format.
    """

    lists: dict[Kind, Sequence[Tensor]]
    format: str = "float32"

    def __getitem__(self, kind: Kind) -> Sequence[Tensor]:
        return self.lists[kind]

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.lists["weight"])

    def dtypes(self) -> list[torch.dtype]:
        """Return the dtypes of the first row."""
        return [column[0].dtype for column in self.lists.values()]

    def by_role(self) -> list[Tensor | None]:
        """Return the first row, in the order of ``ROLES``; None of a kind that is left out."""
        return [self.lists[kind][0] if kind in self.lists else None for kind in ROLES]

    def item_sizes(self) -> list[int]:
        """Return each kind's bytes an element, in the order of ``ROLES``; 0 of one that is left out."""
        return [0 if x is None else x.element_size() for x in self.by_role()]

    def rows(self) -> Iterator[tuple[Tensor, ...]]:
        """Yield each parameter's tensors."""
        return zip(*self.lists.values(), strict=True)

    def of(self, rows: Iterable[Sequence[Tensor]]) -> "Columns":
        """Return other rows, at least one, in the same kinds."""
        return Columns(dict(zip(self.lists, map(list, zip(*rows, strict=True)), strict=True)), self.format)

    def stored(self) -> Format | None:
        """Return the format that the first row's states are in, None if it is not known."""
        return find(self.format, [self.lists[kind][0].dtype for kind in STATES if kind in self.lists])

    def written(self) -> dict[Kind, Sequence[Tensor]]:
        """Return the lists that a step writes."""
        return {kind: column for kind, column in self.lists.items() if ROLES[kind] != "in"}


class Rule(NamedTuple):
    """The numbers of the S3 update.

    Args:
        lr: learning rate, a number or 0-dim, on the CPU or on the parameters' device.
        beta1: decay of m, in [0, 1).
        beta2: decay of s, in [0, 1).
        p: exponent of the denominator, >= 1; 1, 1.5, 2 and 3 have forms of their own.
        weight_decay: decoupled, ``x <- x - lr * (update + weight_decay * x)``.
        nesterov: look ahead by one step, as Algorithm 1 does.
        maximize: ascend instead of descending; the decay still shrinks.
    """

    lr: float | Tensor
    beta1: float
    beta2: float
    p: float
    weight_decay: float
    nesterov: bool
    maximize: bool = False

    @property
    def bound(self) -> float:
        """Of |update|: with one beta |n/b| < 1 in exact arithmetic, and float32 rounding reaches 1 + 1.1e-6."""
        return 1.0 if self.beta1 == self.beta2 else math.inf


class SoftRule(NamedTuple):
    """The numbers of the SoftSignum update.

    Args:
        lr: learning rate, as ``Rule``'s.
        beta: decay of m, in [0, 1).
        tau: temperature, > 0. Infinity, as all beyond float32, is the hard step, sign(n), and 0 where n is below the
            smallest normal number: after thousands of zero gradients m rests at a denormal, whose sign would move the
            weight for ever.
        weight_decay: decoupled.
        nesterov: look ahead by one step.
        maximize: ascend instead of descending; the decay still shrinks.
    """

    lr: float | Tensor
    beta: float
    tau: float
    weight_decay: float
    nesterov: bool
    maximize: bool = False

    @property
    def hard(self) -> bool:
        """Whether the step is the hard one. In float32 a higher tau is infinity, and NaN times an m of 0."""
        return self.tau > torch.finfo(torch.float32).max

    def check(self) -> None:
        """Raise S3Error where a number that schedulers and callbacks write into param groups is out of range."""
        if not self.tau > 0:
            raise S3Error(f"tau is {self.tau}: a temperature must be > 0; infinity is the hard step")
        if not 0 <= self.beta < 1:
            raise S3Error(f"a param group's beta is {self.beta}: it must lie in [0, 1)")


type AnyRule = Rule | SoftRule


def form(p: float) -> int:
    """Name the compiled kernels' formulas for an exponent: p itself, 15 for 1.5; 0 are those for any."""
    return {1: 1, 1.5: 15, 2: 2, 3: 3}.get(p, 0)


class Step(NamedTuple):
    """What one step has beside its tensors and its rule; all of it may be None.

    Args:
        factor: one float32 on the parameters' device by which gradients are multiplied first (1 / loss scale, and the
            clip coefficient).
        found_inf: one float32 on the parameters' device; not 0 makes the whole step do nothing.
        statistics: ``watch.statistics.zeros`` on the parameters' device, to which this step's are added (modified in
            place); u is the update in units of the rate, 0 where a coordinate was left out.
        seed: one int64 on the parameters' device; bfloat16 states are then rounded stochastically, with noise of this
            seed, not to nearest even.
        models: by weight, the model's low-precision copies, of which an optimizer makes the column of model weights;
            kernels look at that alone.
    """

    factor: Tensor | None = None
    found_inf: Tensor | None = None
    statistics: Tensor | None = None
    seed: Tensor | None = None
    models: Mapping[Tensor, Tensor] | None = None


def check_numbers(weight: Tensor, rule: AnyRule, step: Step) -> None:
    """Raise unless every number in a tensor is one element where a kernel can read it; reads no value.

    Raises:
        S3Error: the name, and what it must be.
    """
    lr = rule.lr if isinstance(rule.lr, Tensor) else None
    for name, x in (("lr", lr), ("factor", step.factor), ("found_inf", step.found_inf), ("seed", step.seed)):
        if x is None:
            continue
        if x.numel() != 1:
            raise S3Error(f"{name} is a tensor of {x.numel()} elements: it must be one number")
        if x.device != weight.device and not (name == "lr" and x.device.type == "cpu"):
            raise S3Error(f"{name} is on {x.device} and the weights on {weight.device}: move it there")
        if x.is_complex():
            raise S3Error(f"{name} is {x.dtype}: it must be a real number")
    statistics = step.statistics
    if statistics is None:
        return
    fits = statistics.shape == (len(FIELDS),) and statistics.dtype == torch.float64 and statistics.is_contiguous()
    if not fits or statistics.device != weight.device:
        raise S3Error(
            f"statistics has shape {list(statistics.shape)} and {statistics.dtype} on {statistics.device}: it must be "
            f"{len(FIELDS)} contiguous float64 on {weight.device}"
        )
