"""SoftMuon on the road of Megatron's Muon (0.19): matrices whole on one rank each, and an optimizer beside it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import megatron.core.optimizer as host
from megatron.core.optimizer import MegatronOptimizer, ParamKey
from torch import Tensor

from s3_megatron.engines.megatron.config import own_values
from s3_megatron.engines.megatron.temperature import is_counted
from s3_megatron.errors import S3Error
from s3_megatron.optim import SoftMuon
from s3_megatron.optim.tensor_parallel import Cut


@contextmanager
def in_the_hosts_registry(config: Any, init_state: Callable[..., None]) -> Iterator[None]:
    """Let ``get_megatron_optimizer`` build SoftMuon for matrices, and ask for Adam for the rest.

    ``_is_nonlinear_or_embedding`` of core/optimizer/emerging_optimizers.py (0.19.2) says which weights are the rest.
    """
    from megatron.core.optimizer import emerging_optimizers as emerging

    spec = config.spec

    def build(params: list[dict[str, Any]], **arguments: Any) -> SoftMuon:
        groups = arguments.pop("pg_collection")
        made = SoftMuon(params, lr=config.lr, weight_decay=config.weight_decay, **arguments)
        road = {"tp_mode": _mapped(groups, config.softmuon_tp_mode), "split_qkv": config.softmuon_split_qkv}
        made.defaults.update(road)
        made.write_to_groups(**road)
        made.qkv_of = _qkv_of if config.softmuon_split_qkv else lambda param: None
        made.cut_of = _cut_of(groups, config.softmuon_tp_mode)
        made.counted = _counted_of(groups, config.use_layer_wise_distributed_optimizer)
        return made

    def arguments_of(config: Any, model_chunks: list[Any], pg_collection: Any) -> dict[str, Any]:
        return {**spec.chosen(own_values(spec, config)), "pg_collection": pg_collection}

    is_rest = host.ParamPredicate(name="nonlinear_or_embedding", fn=emerging._is_nonlinear_or_embedding)
    emerging._EMERGING_OPTIMIZERS[spec.name] = emerging.EmergingOptimizerEntry(
        optimizer_cls=build,
        init_state_fn=init_state,
        config_to_kwargs=arguments_of,
        default_param_overrides={ParamKey(predicate=is_rest): {"optimizer": "adam"}},
    )
    try:
        yield
    finally:
        del emerging._EMERGING_OPTIMIZERS[spec.name]


def _qkv_of(param: Tensor) -> list[int] | None:
    """Give the rows of a head group's Q, K and V, by the marks that the host puts on weights (0.19.2)."""
    return param.qkv_split_shapes if getattr(param, "is_qkv", False) else None  # type: ignore[attr-defined]


def _cut_of(groups: Any, mode: str) -> Callable[[Tensor], Cut | None]:
    """Make what says how tensor-parallel ranks share a matrix; ``groups`` is the host's ProcessGroupCollection."""
    for name in ("gtp_remat", "expt_gtp_remat"):
        group = getattr(groups, name, None)
        if group is not None and group.size() > 1:
            raise S3Error(
                "generalized tensor parallelism cuts matrices in a way of its own, in which --optimizer softmuon was "
                "never run: leave it out"
            )

    def cut_of(param: Tensor) -> Cut | None:
        group = groups.expt_tp if getattr(param, "expert_tp", False) else groups.tp
        dim = getattr(param, "partition_dim", -1)
        if mode == "blockwise" or dim not in (0, 1) or group.size() == 1:
            return None
        return Cut(group, dim, is_gathered=mode == "duplicated")

    return cut_of


def _mapped(groups: Any, mode: str) -> str:
    """Say which matrices are mapped, for checkpoints: blockwise, other ranks make other steps of the same state."""
    sizes = sorted({groups.tp.size(), getattr(groups, "expt_tp", groups.tp).size()} - {1})
    return f"blockwise over {' and '.join(map(str, sizes))} ranks" if mode == "blockwise" and sizes else "whole"


def _counted_of(groups: Any, layer_wise: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """Make what says whether this rank counts a matrix for the temperature: the first of those that have it."""
    is_shared_out = layer_wise and groups.dp_cp.size() > 1  # else every data-parallel rank has it

    def counted(param: Tensor, m: Tensor) -> Tensor:
        replicas = groups.expt_dp if getattr(param, "expert_tp", False) else groups.dp_cp
        is_first = is_shared_out or replicas.rank() == 0
        return m if is_first and is_counted(param, groups.tp, groups.expt_tp) else m[:0]

    return counted


def gather_what_shares_a_bucket_group(part: MegatronOptimizer) -> None:
    """Let ``part``, which moves the rest, gather the bucket groups that it shares with the matrices, too.

    ``disable_bucketing``, which virtual pipelines have for all chunks but the first, puts all buckets into one group,
    whose first bucket says who gathers it: the matrices' optimizer, before the rest has moved. Ranks then go on with
    embeddings and norms of the step before, under Muon too (megatron-core 0.19.2).
    """
    start: Callable[[], None] | None = getattr(part, "start_param_sync_for_bucket_group_subset", None)
    if start is None:
        return
    from megatron.core.optimizer.layer_wise_optimizer import _bucket_is_managed_by_layer_wise_optimizer as is_layer_wise

    def start_param_sync_for_bucket_group_subset() -> None:
        start()
        for chunk in part.model_chunks:
            for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
                kinds = [is_layer_wise(bucket, default_for_untagged=False) for bucket in group.buckets]
                if kinds and kinds[0] and not all(kinds):
                    chunk._start_bucket_group_param_sync(group, force_sync=False)

    part.start_param_sync_for_bucket_group_subset = start_param_sync_for_bucket_group_subset
