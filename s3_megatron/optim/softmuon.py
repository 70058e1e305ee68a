"""SoftMuon as a ``torch.optim.Optimizer``."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any, ClassVar, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from s3_megatron.errors import S3Error
from s3_megatron.kernels.foreach import accumulate_
from s3_megatron.optim import registry
from s3_megatron.optim.placement import localize
from s3_megatron.optim.polar import Precision, direction, library, pieces, plan
from s3_megatron.optim.pooled_median import median_and_deviation
from s3_megatron.optim.relaxed import OF_THE_RUN, RelaxedOptimizer
from s3_megatron.optim.settings import names_what_it_takes
from s3_megatron.optim.spec import Spec
from s3_megatron.optim.state import EXP_AVG
from s3_megatron.optim.tensor_parallel import Cut
from s3_megatron.optim.whole_matrices import Matrices, batches
from s3_megatron.watch import statistics


class SoftMuon(RelaxedOptimizer):
    """SoftMuon (arXiv 2605.31371): Muon, whose orthogonal step becomes a soft one near the end of the run.

    m is an average of the gradient, and M is m or, with ``nesterov``, its look-ahead. In the hard phase a weight
    moves along Muon's approximation of M's polar factor, in the soft phase along M (M^T M + tau^-2 I)^(-1/2),
    whose singular values are s / sqrt(s^2 + tau^-2), with a tau that falls (``optim/temperature.py``).

    Parameters are matrices, or stacks of matrices [n, rows, cols] such as experts, each mapped on its own; embeddings,
    outputs, norms and biases belong to another optimizer (``softmuon_groups`` parts a model). The state is one tensor
    a parameter, m, allocated at the first step. A gradient with an entry that is not finite leaves its whole matrix
    and m untouched. Parameters in bfloat16 or float16 are moved in float32, rounded once; the map is float32 at most.

    DTensors are gathered for the map and scattered back, each matrix to one rank of its mesh where weights are sharded.
    Where the soft phase begins, median and median absolute deviation are taken of the singular values of all m of the
    model. All ranks that hold a part of it must take that step; it communicates, and waits for the device.

    Args:
        params: matrices, or dicts defining param groups; lr, beta, weight_decay, nesterov, maximize, qkv_split_shapes
            and the arguments that Megatron's Muon has can be set per group.
        lr: learning rate, >= 0.
        beta: decay of m, in [0, 1).
        weight_decay: decoupled decay, >= 0: ``x <- x - lr * (update + weight_decay * x)``.
        nesterov: look ahead one step: ``beta * m + (1 - beta) * g`` in the place of m in the update.
        total_steps, soft_start, sign_iters, transition_iters, eps, tmax: when the run is soft, as SoftSignum's;
            the map's own phi(x) = x / sqrt(1 + x^2) takes tanh's place.
        scale_mode: what the update of [rows, cols] is multiplied by: "spectral", sqrt(max(rows, cols));
            "unit_rms_norm", sqrt(rows / cols); "shape_scaling", sqrt(max(1, rows / cols)).
        extra_scale_factor: and this. 0.2 with "spectral" makes updates as long as AdamW's.
        qkv_split_shapes: for a group of fused QKV weights, the rows of a head group's Q, K and V; the Q of all groups
            are mapped as one matrix, as the K and the V.
        coefficient_type, num_ns_steps: the hard step's polynomials; "simple" is torch.optim.Muon's.
        fp32_matmul_prec: "medium" lets products be bfloat16, in the soft phase where that stays close to the map;
            "highest" has all in float32.
        maximize: maximize the objective instead of minimizing it.
        process_group: the ranks that hold the model, each matrix or its shards on some of them or all on every one;
            None: all ranks, where torch.distributed runs. Not kept by copies.

    Raises:
        S3Error: (a ValueError) for a hyperparameter out of range, a run without a known length, a parameter that is no
            matrix, a sparse gradient, a loaded state that is not SoftMuon's, or emerging-optimizers missing.
    """

    spec: ClassVar[Spec] = registry.SOFTMUON
    counts_updates: ClassVar[bool] = True
    soft_map = "algebraic"
    # The model's largest Frobenius norm and singular value, where the soft phase began.
    of_the_run = (*OF_THE_RUN, "soft_norm", "soft_largest")

    # For engines whose tensors do not show it: which ranks share a weight's matrix, and the rows of its Q, K and V.
    cut_of: Callable[[Tensor], Cut | None] | None = None
    qkv_of: Callable[[Tensor], Sequence[int] | None] | None = None

    @names_what_it_takes
    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-3,
        beta: float = 0.95,
        weight_decay: float = 0.0,
        *,
        nesterov: bool = True,
        total_steps: int | None = None,
        soft_start: float = 0.9,
        sign_iters: int | None = None,
        transition_iters: int | None = None,
        eps: float = 1e-4,
        tmax: float = 1e9,
        scale_mode: str = "spectral",
        extra_scale_factor: float = 0.2,
        qkv_split_shapes: tuple[int, ...] | None = None,
        coefficient_type: str = "quintic",
        num_ns_steps: int = 5,
        fp32_matmul_prec: Precision = "medium",
        maximize: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "beta": beta,
                "weight_decay": weight_decay,
                "nesterov": nesterov,
                "maximize": maximize,
                "scale_mode": scale_mode,
                "extra_scale_factor": extra_scale_factor,
                "qkv_split_shapes": qkv_split_shapes,
                "coefficient_type": coefficient_type,
                "num_ns_steps": num_ns_steps,
                "fp32_matmul_prec": fp32_matmul_prec,
                # Until they are measured, as large as can be: the longest plan.
                "soft_norm": math.inf,
                "soft_largest": math.inf,
            },
            process_group=process_group,
            total_steps=total_steps,
            soft_start=soft_start,
            sign_iters=sign_iters,
            transition_iters=transition_iters,
            eps=eps,
            tmax=tmax,
        )

    def check_group(self, group: dict[str, Any]) -> None:
        """Raise S3Error for a hyperparameter out of range."""
        super().check_group(group)
        library()  # or say that it is missing
        qkv = group["qkv_split_shapes"]
        if qkv is not None and not (qkv and all(map(_is_count, qkv))):
            raise S3Error(f"qkv_split_shapes is {qkv}: it must be the rows of a head group's Q, K and V, each >= 1")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add matrices with their own hyperparameters; the phases are the whole run's."""
        super().add_param_group(param_group)
        added = self.param_groups[-1]
        try:
            for param in added["params"]:
                self._check_matrix(param, added["qkv_split_shapes"])
        except S3Error:
            self.param_groups.pop()
            raise

    def _check_matrix(self, param: Tensor, qkv: tuple[int, ...] | None) -> None:
        shape = list(param.shape)
        if param.ndim not in (2, 3):
            raise S3Error(
                f"a parameter has the shape {shape}: SoftMuon takes matrices [rows, cols] and stacks of them "
                "[n, rows, cols]; give it to another optimizer (softmuon_groups parts a model)"
            )
        if 0 in shape:
            raise S3Error(f"a parameter has the shape {shape}, no element: leave it out")
        if qkv is not None and (param.ndim != 2 or shape[0] % sum(qkv)):
            raise S3Error(
                f"a parameter of shape {shape} cannot be split by qkv_split_shapes {qkv}: its rows must be a multiple "
                f"of {sum(qkv)}, those of a head group"
            )

    def step_groups(self, tau: float) -> None:
        """Move all groups' matrices, once what callbacks write into groups is looked at."""
        for group in self.param_groups:  # of all, before the first moves
            self.check_group(group)
        super().step_groups(tau)

    def step_group(self, group: dict[str, Any], tau: float) -> None:
        """Move a group's matrices that have a gradient, by the temperature ``tau``; infinity is a hard step."""
        params = [param for param in group["params"] if param.grad is not None]
        if any(param.grad.is_sparse for param in params):
            raise S3Error("a gradient is sparse: SoftMuon takes dense ones; build the embedding with sparse=False")
        for batch in batches(params):
            self._step_batch(batch, group, tau)

    def _step_batch(self, params: list[Tensor], group: dict[str, Any], tau: float) -> None:
        beta, soft = group["beta"], None if tau == math.inf else (tau, *self.plan(group, tau))
        rows, parts, grads = [], [], []
        for param in params:
            assert param.grad is not None
            x, grad, m = localize(param, param.grad, self.state_of(param), self.spec.state_names)
            if m.shape != x.shape:
                raise S3Error(
                    f"a weight of shape {list(x.shape)} has an m of shape {list(m.shape)}: they must be equal; load a "
                    "state of this model's shapes"
                )
            grad = -grad.to(m.dtype) if group["maximize"] else grad.to(m.dtype)
            new = m.lerp(grad, 1 - beta)
            rows.append((x, m, new))
            grads.append(grad)
            ahead = new.lerp(grad, 1 - beta) if group["nesterov"] else new
            parts.append(ahead.float())
        qkv, cut = self._qkv(params[0], group), self._cut(params[0])
        matrices = Matrices(params, parts, cut)
        together = None if cut is None or cut.is_gathered else cut
        updates = matrices.back([direction(mine, soft, group, qkv, together) for mine in matrices.mine])
        self._add_updates(updates, grads)
        for (x, m, new), update in zip(rows, updates, strict=True):
            # A matrix that could not be mapped is NaN everywhere, on every rank that has a part of it.
            self._move(x, m, new, update.to(m.dtype), group, keep=update[..., :1, :1].isnan())

    def _move(self, x: Tensor, m: Tensor, new: Tensor, update: Tensor, group: dict[str, Any], *, keep: Tensor) -> None:
        """Write a weight, moved by ``update``, and its ``new`` m; both stay where ``keep`` is true."""
        lr, before = group["lr"], x.to(m.dtype)
        if isinstance(lr, Tensor):
            lr = lr.reshape(())  # of another shape, one on the host goes with no weight on a GPU
        moved = before * (1 - lr * group["weight_decay"]) - lr * update
        x.copy_(torch.where(keep, before, moved))
        m.copy_(torch.where(keep, m, new))

    def _add_updates(self, updates: list[Tensor], grads: list[Tensor]) -> None:
        """Add what this rank has of ``updates``, NaN where a matrix stays, to ``update_statistics``, where these are.

        Of an update whose entries have no bound none is saturated.
        """
        if self.update_statistics is None or not updates:
            return
        found = statistics.zeros(device=updates[0].device)
        accumulate_(found, [update.nan_to_num(0.0) for update in updates], grads)
        found[statistics.SATURATED].fill_(torch.nan)  # an assignment copies from the host, and waits
        statistics.merge_(self.update_statistics, found.to(self.update_statistics.device))

    def _qkv(self, param: Tensor, group: dict[str, Any]) -> Sequence[int] | None:
        return group["qkv_split_shapes"] if self.qkv_of is None else self.qkv_of(param)

    def _cut(self, param: Tensor) -> Cut | None:
        return None if self.cut_of is None else self.cut_of(param)

    def plan(self, group: dict[str, Any], tau: float) -> tuple[int, Precision]:
        """Return how many steps of the iteration a soft step takes, and in which precision."""
        steps, precision = plan(tau, group["soft_norm"], group["soft_largest"])
        return steps, precision if group["fp32_matmul_prec"] == "medium" else "highest"

    def measure(self, *others: Self) -> tuple[float, float]:
        """Return median and median absolute deviation of the singular values of m over the model; keep the largest.

        ``others`` have the rest of its matrices on this rank.
        """
        ranks = self.ranks
        # Norm, singular value, and whether an entry is not finite.
        counted, sizes = [], torch.zeros(3, device=self._device())
        together = (self, *others)
        for piece, is_counted in (one for each in together for one in each._measured()):
            if not piece.numel():  # a stack with fewer matrices than ranks
                continue
            is_bad = ~piece.isfinite().all()
            values = torch.linalg.svdvals(piece.nan_to_num(0.0, 0.0, 0.0))
            norms = torch.linalg.vector_norm(values, dim=-1)
            found = torch.stack([norms.max(), values.max(), is_bad.float()])
            sizes = torch.maximum(sizes, found.to(sizes.device))
            if is_counted:
                counted.append(values)
        if ranks is not None:
            dist.all_reduce(sizes, dist.ReduceOp.MAX, group=ranks)
        norm, largest, is_bad = sizes.tolist()
        if is_bad:
            raise S3Error(
                "an m is not finite: the soft phase cannot begin; resume from a checkpoint whose state is finite"
            )
        for each in together:
            each.write_to_groups(soft_norm=norm, soft_largest=largest)
        return median_and_deviation(counted, ranks)

    def _device(self) -> torch.device | None:
        """Where matrices are measured, and what ranks tell each other lies."""
        params = [param for group in self.param_groups for param in group["params"]]
        if params or not torch.accelerator.is_available():
            return params[0].device if params else None
        return torch.accelerator.current_accelerator()

    def _measured(self) -> Iterator[tuple[Tensor, bool]]:
        """Yield every matrix of m, whole, that is on this rank, and whether it is this rank that counts it."""
        ranks = self.ranks
        all_params = [param for group in self.param_groups for param in group["params"]]
        has_dtensors = any(isinstance(param, DTensor) for param in all_params)
        for group in self.param_groups:
            # A weight that got no gradient yet has an m of 0, whether or not an engine has allocated it.
            for batch in batches([p for p in group["params"] if p.requires_grad or self.state.get(p)]):
                qkv, cut = self._qkv(batch[0], group), self._cut(batch[0])
                ms = [self.state_of(param)[EXP_AVG] for param in batch]
                parts = [(m.to_local() if isinstance(m, DTensor) else m).float() for m in ms]
                matrices = Matrices(batch, parts, cut and replace(cut, is_gathered=True))
                is_counted = self.counted is None or self.counted(batch[0], ms[0]).numel() > 0
                is_copy = has_dtensors and not isinstance(batch[0], DTensor) and dist.get_rank(ranks) > 0
                for piece in [piece for m in matrices.mine for piece in pieces(m, qkv)]:
                    yield piece, matrices.is_counted and is_counted and not is_copy


def _is_count(value: Any) -> bool:
    return isinstance(value, Integral) and int(value) >= 1
