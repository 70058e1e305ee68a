"""The worker's checks of what DeepSpeed 0.17.6 cannot do, with AdamW either; on a newer one they do not exist."""

from collections.abc import Callable

import torch
import torch.distributed as dist

from tests.engines.deepspeed.checkpoints import ADAM, convert, load, save
from tests.engines.deepspeed.harness import FLOAT32_ACCUMULATION, Net, Run, gradients
from tests.rank_checks import refuses, shared_folder


def fails(call: Callable[[], object], error: type[Exception], message: str) -> None:
    """Assert that the host itself raises."""
    try:
        call()
    except error as failure:
        assert message in str(failure), failure
    else:
        raise AssertionError(f"{message} was expected: tests/engines/deepspeed/window.py leaves out what works by now")


def check_accumulation_at_stage_2_is_refused() -> None:
    """AdamW's m was made of the second micro-batch alone, of half the gradient."""
    refuses(lambda: Run(2, accumulate=2), "gradient_accumulation_steps is 2 at ZeRO stage 2", "use stage 1 or 3")
    Run(2, accumulate=2, offload=True)
    for offload, part in ((True, 1.0), (False, 0.5)):
        run, grads = Run(2, accumulate=2, offload=offload, **ADAM), gradients(0)
        run.step(grads)
        torch.testing.assert_close(run.state("exp_avg")["linear"], part * 0.1 * grads["linear"])


def check_16_bit_without_sharding_is_refused() -> None:
    """AdamW decayed a weight that was frozen, and its checkpoint could not be loaded."""
    refuses(lambda: Run(0, "bf16"), "bfloat16 at ZeRO stage 0", "use stage 1")
    refuses(lambda: Run(1, "bf16", **FLOAT32_ACCUMULATION), "stage 1 with another grad_accum_dtype", "use stage 1")
    adam = Run(0, "bf16", optimizer="AdamW", params={"torch_adam": True, "lr": 0.5})
    adam.s3.param_groups[1]["weight_decay"] = 0.1
    adam.step(gradients(0))
    assert float(adam.net.frozen[0]) < 0.99
    folder = shared_folder()
    save(adam, folder)
    fails(lambda: load(adam, folder), AttributeError, "no attribute 'dp_process_group'")
    assert type(Run(1, "bf16", **FLOAT32_ACCUMULATION, **ADAM).wrapper).__name__ == "FP16_UnfusedOptimizer"


def check_a_parameter_without_elements_fails() -> None:
    for stage in (1, 2):
        run = Run(stage, net=Net(empty=True), **ADAM)
        fails(lambda run=run: run.step(gradients(0, run.net)), KeyError, "2")


def check_a_rank_with_only_padding_of_a_group_fails() -> None:
    run = Run(1, alone=True, **ADAM)
    loss = run.engine(gradients(0))
    if dist.get_rank() == 0:
        run.engine.backward(loss)
    else:
        fails(lambda: run.engine.backward(loss), IndexError, "list index out of range")


def check_a_nan_in_float32_is_taken_for_a_gradient() -> None:
    for stage in (1, 2, 3):
        run, bad = Run(stage, **ADAM), gradients(0)
        bad["linear"][0, 0] = float("nan")
        assert run.step(bad) and run.weights()["linear"].isnan().any()


def check_zero_3_cannot_be_converted() -> None:
    """With two param groups the converter fails; and the loader would read the first group alone."""
    folder, adam = shared_folder(), Run(3, **ADAM)
    adam.step(gradients(0))
    save(adam, folder)
    if dist.get_rank() == 0:
        fails(lambda: convert(folder), RuntimeError, "exceeds dimension size")
    loads = Run(3).wrapper.load_hp_checkpoint_state_from_checkpoint_dir_stage3
    refuses(lambda: loads("nowhere", []), "the first param group alone", "deepspeed 0.19")
