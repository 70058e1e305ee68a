"""SoftMuon under ZeRO 1 and 2: matrices whole again for the step, where a partition's border cuts them; S3 beside it.

DeepSpeed's own Muon (0.19.8) maps gradients before the step, so that ``gradient_clipping`` shortens its updates to a
norm of 1, and keeps a momentum of whole matrices, which no universal checkpoint has. Here gradients come to the step as
with any optimizer, unscaled and clipped, and m lies in partitions as S3's does.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from s3_megatron.engines.deepspeed.layout import flat_partitions, inside
from s3_megatron.errors import S3Error
from s3_megatron.optim import S3, SoftMuon, softmuon_groups
from s3_megatron.optim.polar import direction, pieces
from s3_megatron.optim.spec import Spec
from s3_megatron.optim.state import EXP_AVG
from s3_megatron.watch import statistics

# By their names, as DeepSpeed's Muon leaves them out (0.19.8, set_optimizer_flags of deepspeed/__init__.py).
_NO_MATRICES = ("*embed*", "*lm_head*")
_REST = "s3"  # the entry "optimizer" of a param group that S3 moves


@dataclass(frozen=True)
class Piece:
    """A matrix and where it lies in the flat tensor of its param group, of which each rank has one partition.

    Attributes:
        shape: of the matrix.
        first: where it begins, in elements, from the start of this rank's partition; may be negative.
        size: elements of a partition.
        group: the ranks that have a partition.
        device: of the model's weight, where the matrix is made whole and mapped.
        qkv: of a fused QKV weight the rows of a head group's Q, K and V; else None.
    """

    shape: torch.Size
    first: int
    size: int
    group: dist.ProcessGroup
    device: torch.device
    qkv: Sequence[int] | None

    @property
    def mine(self) -> slice:
        """What of it is in this rank's partition."""
        return inside(self.first, self.shape.numel(), self.size)

    @property
    def part(self) -> slice:
        """The same elements, of the matrix as a row."""
        return slice(self.mine.start - self.first, self.mine.stop - self.first)

    @property
    def is_cut(self) -> bool:
        """Whether several ranks have a part of it: the same on all of them."""
        start = self.first + dist.get_rank(self.group) * self.size
        return start // self.size != (start + self.shape.numel() - 1) // self.size

    def whole(self, partition: Tensor) -> Tensor | None:
        """Return the matrix in float32, or None on a rank that has nothing of it; where it is cut all ranks come here.

        Adding zeros changes no bit, and what is not finite on one rank is not on all.
        """
        has_some = self.mine.stop > self.mine.start
        if not (self.is_cut or has_some):
            return None
        row = torch.zeros(self.shape.numel(), dtype=torch.float32, device=self.device)
        if has_some:
            row[self.part] = partition[self.mine].to(row)
        if self.is_cut:
            dist.all_reduce(row, group=self.group)
        return row.view(self.shape) if has_some else None


class ZeroMatrices(SoftMuon):
    """SoftMuon for the matrices of a model in ZeRO 1 or 2, and S3 for the rest, in param groups of their own.

    Its name has no "muon": ZeRO 1 and 2 (deepspeed 0.19.8, ``_is_muon_group``) take a class whose name has for
    DeepSpeed's Muon, and map the gradients of weights that have its mark ``use_muon``.
    """

    # By a group's partition, once ZeRO has made them.
    pieces: Mapping[Tensor, list[Piece]] = MappingProxyType({})

    def __init__(
        self,
        matrices: list[dict[str, Any]],
        rest: list[dict[str, Any]],
        split_qkv: Mapping[str, Sequence[int]],
        qkv: Mapping[Tensor, Sequence[int]],
        **settings: Any,
    ) -> None:
        """Take param groups of both kinds, and which weights are fused QKV, as asked and as found in the model.

        ``settings`` are SoftMuon's, of which S3 shares what they have in common.
        """
        self.qkv_of = qkv.get
        shared = {name: settings[name] for name in ("lr", "weight_decay", "maximize") if name in settings}
        self._s3 = S3(rest, **shared) if rest else None
        others = [] if self._s3 is None else [{**group, "optimizer": _REST} for group in self._s3.param_groups]
        super().__init__([*matrices, *others], **settings)
        # For checkpoints: another way to split makes other steps of the same state.
        self.defaults["split_qkv"] = asked = {name: [*rows] for name, rows in split_qkv.items()}
        self.write_to_groups(split_qkv=asked)

    def _check_matrix(self, param: Tensor, qkv: tuple[int, ...] | None) -> None:
        if self.spec_of(param) is self.spec:
            super()._check_matrix(param, qkv)

    def spec_of(self, param: Tensor) -> Spec:
        """Give S3's for a parameter of a group that it moves."""
        groups = [group for group in self.param_groups if any(param is each for each in group["params"])]
        return S3.spec if groups and _is_s3s(groups[0]) else self.spec

    def step_group(self, group: dict[str, Any], tau: float) -> None:
        """Move a group's partition, by S3 or by the temperature ``tau``."""
        if _is_s3s(group):
            assert self._s3 is not None
            self._s3.param_groups, self._s3.state = [group], self.state
            if self.update_statistics is not None:
                self._s3.update_statistics = statistics.zeros(device=self.update_statistics.device)
            self._s3.step()
            if self._s3.update_statistics is not None:
                assert self.update_statistics is not None
                statistics.merge_(self.update_statistics, self._s3.update_statistics)
            return
        for partition in group["params"]:
            if partition.grad is not None:
                self._step_partition(partition, group, tau)

    def _step_partition(self, x: Tensor, group: dict[str, Any], tau: float) -> None:
        m, sign = self.state_of(x)[EXP_AVG], -1 if group["maximize"] else 1
        assert x.grad is not None
        grad = sign * x.grad.to(m.dtype)
        new = m.lerp(grad, 1 - group["beta"])
        ahead = new.lerp(grad, 1 - group["beta"]) if group["nesterov"] else new
        soft = None if tau == torch.inf else (tau, *self.plan(group, tau))
        update, mine = torch.zeros_like(ahead), []  # padding has none
        for piece in self.pieces[x]:
            whole = piece.whole(ahead)
            if whole is not None:
                mapped = direction(whole, soft, group, piece.qkv).reshape(-1)
                update[piece.mine] = mapped[piece.part].to(update)
                mine.append(piece.mine)
        self._add_updates([update[place] for place in mine], [grad[place] for place in mine])
        self._move(x, m, new, update, group, keep=update.isnan())

    def _device(self) -> torch.device | None:
        return next(piece.device for pieces in self.pieces.values() for piece in pieces)

    def _measured(self) -> Iterator[tuple[Tensor, bool]]:
        """Yield the m of each matrix of which this rank has a part, and whether it has its beginning."""
        for partition in [p for group in self.param_groups if not _is_s3s(group) for p in group["params"]]:
            for piece in self.pieces[partition]:
                whole = piece.whole(self.state_of(partition)[EXP_AVG])
                for matrix in [] if whole is None else pieces(whole, piece.qkv):
                    yield matrix, piece.first >= 0


def _is_s3s(group: dict[str, Any]) -> bool:
    return group.get("optimizer") == _REST


def make_groups(module: nn.Module, params: Iterable[Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Part ``params``, weights or param groups, into groups of matrices and of the rest, with what each group has.

    A weight with DeepSpeed's mark ``use_muon`` goes where that says.
    """
    given = [each if isinstance(each, dict) else {"params": [each]} for each in params]
    if all(len(group) == 1 for group in given):
        given = [{"params": [param for group in given for param in group["params"]]}]
    names = [pattern for pattern in _NO_MATRICES if _fits(module, pattern)]
    matrices = {id(param) for param in softmuon_groups(module, names)[0]}
    parts: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for group in given:
        weights = [param for param in group["params"] if param.requires_grad]
        for wanted, kind in zip((True, False), parts, strict=True):
            mine = [p for p in weights if getattr(p, "use_muon", id(p) in matrices) is wanted]
            if mine:
                kind.append({**group, "params": mine})
    if not parts[0]:
        raise S3Error("no matrix of the parameters is left for SoftMuon: it is for hidden layers; take S3 for all")
    return parts


def _fits(module: nn.Module, pattern: str) -> bool:
    return any(fnmatchcase(name, pattern) for name, _ in module.named_parameters())


def find_qkv(module: nn.Module, matrices: list[dict[str, Any]], split_qkv: Any) -> dict[Tensor, Sequence[int]]:
    """Find the fused QKV weights: no mark of DeepSpeed's, nor of a model's, says which they are.

    Args:
        module: the model.
        matrices: the param groups that SoftMuon moves.
        split_qkv: by a pattern of names (``*`` and ``?``) the rows of a head group's Q, K and V; a weight has as many
            groups as its rows are a multiple of their sum. Weights that lie Q before K before V have one group.

    Raises:
        S3Error: it is something else, fits no weight or one of S3's, or does not divide a weight's rows.
    """
    if not isinstance(split_qkv, dict) or not all(map(_are_rows, split_qkv.values())):
        raise S3Error(
            f"SoftMuon's split_qkv is {split_qkv!r}: it must have the rows of a head group's Q, K and V by the names "
            'of fused weights, as {"*.query_key_value.weight": [64, 64, 64]}; leave it out to split nothing'
        )
    mine = {id(param) for group in matrices for param in group["params"]}
    found: dict[Tensor, Sequence[int]] = {}
    for pattern, rows in split_qkv.items():
        named = {name: param for name, param in module.named_parameters() if fnmatchcase(name, pattern)}
        if not named:
            some = ", ".join([name for name, _ in module.named_parameters()][:8])
            raise S3Error(f"split_qkv has {pattern!r}, and no parameter of the model is called so; it has {some}, ...")
        for name, param in named.items():
            if not param.requires_grad:
                continue
            if id(param) not in mine or param.ndim != 2:
                raise S3Error(
                    f"split_qkv has {pattern!r}, and {name} of shape {list(param.shape)} is no matrix of SoftMuon's: "
                    "name the weights of fused QKV layers alone"
                )
            if found.setdefault(param, rows) != rows or param.shape[0] % sum(rows):
                raise S3Error(
                    f"split_qkv has {pattern!r} with {rows}, and {name} has {param.shape[0]} rows: they must be a "
                    f"multiple of {sum(rows)}, a head group's, and {name} must fit one entry; a weight whose outputs "
                    "are its columns, as transformers' Conv1D has, cannot be split"
                )
    return found


def _are_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(each) is int and each > 0 for each in value)


def refuse(engine: Any, client: Any) -> None:
    """Raise S3Error for an object, and for a stage at which a rank has no partition, or no whole gradient, to step."""
    if client is not None and not isinstance(client, ZeroMatrices):
        raise S3Error(
            'a SoftMuon object knows no partitions: give {"type": "SoftMuon"} in the DeepSpeed configuration, which '
            "parts the model's weights between SoftMuon and S3"
        )
    stage = int(engine.zero_optimization_stage())
    if stage not in (1, 2):
        raise S3Error(
            f"SoftMuon runs in ZeRO 1 and 2 alone, and this is stage {stage}: set stage 1 or 2; stage 3 steps parts of "
            "matrices, and FSDP2 does without DeepSpeed"
        )


def lay_out(optimizer: ZeroMatrices, wrapper: Any) -> dict[Tensor, list[Piece]]:
    """Find the matrices in ZeRO's partitions."""
    assert optimizer.qkv_of is not None
    return {
        master: [
            Piece(weight.shape, first, master.numel(), ranks, weight.device, optimizer.qkv_of(weight))
            for weight, first in places
        ]
        for master, ranks, places in flat_partitions(wrapper)
        if optimizer.spec_of(master) is optimizer.spec
    }
