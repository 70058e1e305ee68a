"""Runs on ranks: SoftMuon with experts, whose data-parallel ranks are others than the dense weights'.

The net is that of experts.py, without biases. Without the layer-wise optimizer Megatron makes a second SoftMuon, of
experts; the temperature is one for all.
"""

from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch import Tensor, nn

from s3_megatron.engines.megatron.factory import parts_of
from s3_megatron.optim import S3, SoftMuon
from tests.engines.megatron import experts, softmuon_harness
from tests.engines.megatron import harness as on
from tests.engines.megatron.experts import HARD, LAYOUTS, STEPS, compare, step, whole_gradients, whole_weights
from tests.engines.megatron.softmuon_harness import alone
from tests.rank_checks import refuses, shared_folder

WITHOUT_BIASES = {name: shape for name, shape in experts.SHAPES.items() if not name.endswith("bias")}
# Precision, the layer-wise optimizer, and whether buffers are laid out for it.
ROADS = (("bf16", True, True), ("bf16", True, False), (None, False, False), ("bf16", False, False))
# The longest step: 0.2 * sqrt(12) times the rate.
LONGEST = on.LR * 0.2 * 12**0.5


def started(*extra: str, frozen: str = "none", **run: Any) -> softmuon_harness.Run:
    net = experts.Net()
    for name, param in net.named_parameters():
        param.requires_grad_(not name.startswith(frozen))
    return softmuon_harness.Run(*extra, net=net, **run)


def softmuons(run: softmuon_harness.Run) -> list[SoftMuon]:
    inner = [part.optimizer for part in parts_of(run.optimizer)]
    return [each for each in inner if type(each) is SoftMuon]


def numbers(run: softmuon_harness.Run) -> set[tuple[Any, ...]]:
    """Schedule, temperature and steps of every SoftMuon on every rank."""
    own = {(each.schedule, each.tau, group["steps_taken"]) for each in softmuons(run) for group in each.param_groups}
    everywhere: list[set[Any]] = [set()] * dist.get_world_size()
    dist.all_gather_object(everywhere, own)
    return set.union(*everywhere)


def unsharded(frozen: str = "none") -> tuple[list[Any], dict[str, nn.Parameter]]:
    copies = {name: nn.Parameter(value) for name, value in whole_weights().items() if not name.startswith(frozen)}
    matrices = [param for name, param in copies.items() if name != "embedding_weight" and param.ndim > 1]
    muon = SoftMuon(matrices, on.LR, weight_decay=on.DECAY, total_steps=STEPS, soft_start=0.5, process_group=alone())
    vectors = [param for param in copies.values() if param.ndim == 1]
    rest = [{"params": [copies["embedding_weight"]]}, {"params": vectors, "weight_decay": 0.0}]
    return [muon, S3(rest, on.LR, weight_decay=on.DECAY)], copies


def advance(optimizers: list[Any], copies: dict[str, nn.Parameter], grads: dict[str, Tensor]) -> None:
    for name, param in copies.items():
        param.grad = grads[name].clone()
    for optimizer in optimizers:
        optimizer.step()


def trained(run: softmuon_harness.Run, frozen: str = "none") -> None:
    """All steps beside the unsharded run; every SoftMuon on every rank has its schedule, to the bit."""
    optimizers, copies = unsharded(frozen)
    for number in range(STEPS):
        assert step(run, whole_gradients(number))
        advance(optimizers, copies, whole_gradients(number))
        assert numbers(run) == {(optimizers[0].schedule, optimizers[0].tau, number + 1)}, number
    assert optimizers[0].schedule.first == HARD
    compare(run, copies)


def check_softmuon_with_expert_parallelism_equals_the_unsharded_run() -> None:
    """Dense matrices are on all expert-parallel ranks, routers on all tensor-parallel ones: each counts once.

    Where the layer-wise optimizer has one dense data-parallel rank and several of experts it shares no expert out: the
    temperature was of experts' momenta that had no whole gradient, 25% off, and Megatron ended at the first save.
    """
    on.since(19, "road for whole matrices")
    with patch.dict(experts.SHAPES, WITHOUT_BIASES, clear=True):
        for number, layout in enumerate(LAYOUTS[dist.get_world_size()]):
            with on.parallel(*layout):
                for precision, layer_wise, laid_out in ROADS if number == 0 else ROADS[::2]:
                    if layer_wise and experts.size_of("data_parallel") == 1 < experts.size_of("expert_data_parallel"):
                        refuses(lambda w=laid_out: started(layout=w), "does not share experts out", "experts 2")
                        continue
                    run = started(precision=precision, layer_wise=layer_wise, layout=laid_out)
                    assert len(softmuons(run)) == (1 if layer_wise else 2), layout
                    trained(run)


def check_softmuon_with_frozen_experts() -> None:
    """One, of which its rank has no matrix in the group, or all: it counts for nothing."""
    on.since(19, "road for whole matrices")
    with patch.dict(experts.SHAPES, WITHOUT_BIASES, clear=True), on.parallel(1, 2):
        for precision, layer_wise, laid_out in ROADS[::3]:
            for frozen in ("experts0", "experts"):
                run = started(frozen=frozen, precision=precision, layer_wise=layer_wise, layout=laid_out)
                trained(run, frozen)


def check_softmuon_beside_experts_biases() -> None:
    """Which another optimizer moves: where buffers are laid out Megatron has none for those of experts, and ended in an
    AssertionError of five lines."""
    on.since(19, "road for whole matrices")
    with on.parallel(1, 2):
        for precision, layer_wise, laid_out in ROADS[1:]:
            trained(started(precision=precision, layer_wise=layer_wise, layout=laid_out))
        refuses(started, "experts' biases", "--disable-bias-linear", "--no-use-layer-wise-param-layout")


def check_softmuons_experts_resume_under_another_expert_parallelism() -> None:
    """With --expert-model-parallel-size 1 experts are in the dense matrices' param group, above that in one of their
    own: "Cannot merge two lists with different lengths", of Muon too. In both phases, to and fro; in the same layout
    as well."""
    on.since(19, "road for whole matrices")
    changes = {2: [(2, 2), (1, 2), (2, 1)], 4: [(1, 4), (2, 4), (4, 1)]}[dist.get_world_size()]
    with patch.dict(experts.SHAPES, WITHOUT_BIASES, clear=True):
        for before, after in changes:
            for precision, layer_wise, laid_out in ROADS[::3]:
                road = {"precision": precision, "layer_wise": layer_wise, "layout": laid_out}
                for saved_at in (2, HARD + 2):
                    optimizers, copies = unsharded()
                    with on.parallel(1, before):
                        run = started(**road)
                        for number in range(saved_at):
                            assert step(run, whole_gradients(number))
                        on.save(run, folder := shared_folder(), "fully_reshardable")
                        weights = experts.whole(run)
                    with on.parallel(1, after):
                        run = experts.loaded(started(**road), weights, folder, "fully_reshardable")
                        for number in range(STEPS):
                            advance(optimizers, copies, whole_gradients(number))
                            if number >= saved_at:
                                assert step(run, whole_gradients(number))
                        assert numbers(run) == {(optimizers[0].schedule, optimizers[0].tau, STEPS)}
                        compare(run, copies)
