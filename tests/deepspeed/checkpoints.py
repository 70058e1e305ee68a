"""The worker's checks of saving and loading.

The run on 2 ranks leaves universal checkpoints behind, which those on 1 and on 4 ranks go on from.
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.checkpoint import ds_to_universal
from deepspeed.utils import logger
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from s3_megatron.engines.deepspeed import activity
from tests.checks import refuses, shared_folder
from tests.deepspeed.harness import (
    ALONE,
    DECAY,
    FLOAT32_ACCUMULATION,
    STATES,
    Reference,
    Run,
    close,
    equal,
    gradients,
    same,
)
from tests.deepspeed.window import OLD, ZERO_OF_16_BIT

BEFORE, AFTER = 4, 3  # steps before a checkpoint, and after it
ADAM = {"optimizer": "AdamW", "params": {"torch_adam": True}}
ZERO_OF_ADAM = (1,) if OLD else (1, 3)  # of universal checkpoints, which ZeRO-3 of 0.17.6 cannot convert (limits.py)
# By name: stage, precision, and what else makes the run.
KINDS: dict[str, tuple[int, str, dict[str, Any]]] = {
    "stage1": (1, "fp32", {}),
    "stage1-bf16": (1, "bf16", {}),
    # DeepSpeed's converter fails on a group of BF16_Optimizer that is smaller than its padding (with AdamW too).
    **({} if OLD else {"stage1-bf16-float32-accumulation": (1, "bf16", {**FLOAT32_ACCUMULATION, "alone": False})}),
    "stage2": (2, "fp32", {}),
    "stage2-bf16-offload": (2, "bf16", {"offload": True}),
    "stage3": (3, "fp32", {"zero": {"sub_group_size": 400}}),
    "stage3-bf16": (3, "bf16", {"params": {"state_dtype": "bfloat16"}}),
}
UNIVERSAL = [name for name in KINDS if not OLD or KINDS[name][0] < 3]


def make(name: str, **more: Any) -> Run:
    stage, precision, settings = KINDS[name]
    return Run(stage, precision, **{**settings, **more})


def save(run: Run, folder: Path) -> None:
    # DeepSpeed's converter demands the entry of ZeRO 1 and 2 (deepspeed 0.19.8, checkpoint/ds_to_universal.py).
    run.engine.save_checkpoint(str(folder), tag="saved", client_state={"universal_checkpoint_info": {}})


def load(run: Run, folder: Path, **how: Any) -> None:
    path, _ = run.engine.load_checkpoint(str(folder), tag="saved", **how)
    assert path is not None


def hyperparameters(run: Run) -> list[dict[str, Any]]:
    return [{name: value for name, value in group.items() if name != "params"} for group in run.s3.param_groups]


def train(run: Run, first: int, last: int) -> list[float]:
    """Steps ``first`` to ``last`` - 1; returns the losses."""
    losses = []
    for step in range(first, last):
        losses.append(float(run.engine(gradients(step)).detach()))
        assert run.step(gradients(step))
    return losses


def check_resuming_on_as_many_ranks_is_exact(_: Path) -> None:
    """Losses, weights, m and r to the bit, and every group's hyperparameters."""
    kinds = {"stage0": (0, "fp32", {}), **({} if OLD else {"stage0-bf16": (0, "bf16", {})}), **KINDS}
    for name, (stage, precision, settings) in kinds.items():
        folder, run = shared_folder(), Run(stage, precision, **settings)
        train(run, 0, BEFORE)
        save(run, folder)
        losses = train(run, BEFORE, BEFORE + AFTER)
        resumed = Run(stage, precision, **settings)
        train(resumed, 20, 21)  # something else, which must leave no trace
        load(resumed, folder)
        assert train(resumed, BEFORE, BEFORE + AFTER) == losses, name
        equal(resumed.everything(), run.everything())
        assert hyperparameters(resumed) == hyperparameters(run)
        for states in STATES:
            equal([*resumed.state(states).values()], [*run.state(states).values()])


def check_zero_to_fp32_gives_the_weights(_: Path) -> None:
    for name in ("stage1-bf16", "stage2", "stage3"):
        folder, run = shared_folder(), make(name)
        train(run, 0, BEFORE)
        weights = run.weights()
        save(run, folder)
        dist.barrier()
        found = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag="saved")
        close({key: found[key] for key in weights}, weights, rtol=0.0, atol=0.0)


def check_an_adam_checkpoint_is_refused_or_converted(_: Path) -> None:
    for stage, precision in ((0, "fp32"), (0, "bf16"), (1, "bf16"), (2, "fp32"), (3, "fp32")):
        if precision == "bf16" and stage not in ZERO_OF_16_BIT:
            continue
        folder, adam = shared_folder(), Run(stage, precision, **ADAM)
        train(adam, 0, BEFORE)
        save(adam, folder)
        before = Run(stage, precision)
        train(before, 0, 1)
        held = before.everything()
        refuses(functools.partial(load, before, folder), "not written by S3", '"s3_from_adam": true')
        equal(before.everything()[len(held) // 3 :], held[len(held) // 3 :])  # m and r

        converted = Run(stage, precision, params={"s3_from_adam": True})
        ours = hyperparameters(converted)
        load(converted, folder)
        assert hyperparameters(converted) == ours
        close(converted.weights(), adam.weights(), rtol=0.0, atol=0.0)
        m, r = (converted.state(name) for name in STATES)
        close(m, adam.state(STATES[0]), rtol=0.0, atol=0.0)
        close(r, {key: v.sqrt() for key, v in adam.state(STATES[1]).items()}, rtol=0.0, atol=0.0)
        train(converted, BEFORE, BEFORE + AFTER)

        folder = shared_folder()
        save(converted, folder)
        load(Run(stage, precision), folder)  # it is S3's own now
        refuses(functools.partial(load, Run(stage, precision, **ADAM), folder), "written by S3", "AdamW")
        load(Run(stage, precision, **ADAM), folder, load_optimizer_states=False)


def check_a_checkpoints_hyperparameters_are_said(_: Path) -> None:
    folder = shared_folder()
    save(Run(2), folder)
    lines: list[str] = []
    original, logger.warning = logger.warning, lines.append
    try:
        load(Run(2), folder)
        assert not any("goes on with" in line for line in lines)
        load(Run(2, params={"p": 2.0}), folder)
    finally:
        logger.warning = original
    assert any("goes on with the checkpoint's p: [3.0]" in line and "[2.0]" in line for line in lines), lines


def check_universal_checkpoints_go_on_with_other_ranks(folder: Path) -> None:
    """From 2 ranks to 2, 1 and 4: masters, m, r to the bit, every group's own hyperparameters, the same training after.

    DeepSpeed gave every group the first one's hyperparameters after a ZeRO-3 load, one step tensor to all sub-groups,
    and raised IndexError on a rank with nothing but padding of a group (ZeRO 1 and 2 on 4 ranks).
    """
    if dist.get_world_size() == 2:
        write_universal(folder)
    for name in UNIVERSAL:
        run = make(name, checkpoint={"load_universal": True})
        train(run, 20, 21)
        load(run, folder / name / "universal")
        saved = torch.load(folder / f"{name}.pt", weights_only=True)
        close(run.weights(), saved["weights"], rtol=0.0, atol=0.0)
        for states in STATES:
            close(run.state(states), saved[states], rtol=0.0, atol=0.0)
        assert {run.s3.state[m][s].dtype for m in run.s3.state for s in STATES} == {run.s3.state_dtype}
        alone = KINDS[name][2].get("alone", ALONE)
        assert [group["weight_decay"] for group in run.s3.param_groups] == [DECAY, 0.0, 0.5][: 2 + alone]
        steps = activity(run.engine).steps
        train(run, BEFORE, BEFORE + AFTER)
        assert activity(run.engine).steps == steps + AFTER
        if run.s3.state_dtype == torch.float32:
            reference = Reference(alone=alone)
            for step in range(BEFORE + AFTER):
                reference.step(gradients(step))
            same(run, reference)


def write_universal(folder: Path) -> None:
    """Train every kind, save it, and convert what was saved as a person does."""
    adams = {f"adam{stage}": functools.partial(Run, stage, **ADAM) for stage in ZERO_OF_ADAM}
    for name, start in {**{name: functools.partial(make, name) for name in UNIVERSAL}, **adams}.items():
        run = start()
        train(run, 0, BEFORE)
        save(run, folder / name)
        whole = {"weights": run.weights(), **{states: run.state(states) for states in STATES}}
        if dist.get_rank() == 0:
            convert(folder / name)
            torch.save(whole, folder / f"{name}.pt")
        dist.barrier()


def convert(folder: Path) -> None:
    """DeepSpeed's converter, in this process: its own start takes longer than all else here."""
    arguments = ["--input_folder", str(folder / "saved"), "--output_folder", str(folder / "universal/saved")]
    arguments += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    argv, sys.argv = sys.argv, ["ds_to_universal", *arguments]
    try:
        ds_to_universal.main(ds_to_universal.parse_arguments())
    finally:
        sys.argv = argv


def check_universal_checkpoints_of_adam_are_refused_or_converted(folder: Path) -> None:
    for stage in ZERO_OF_ADAM:
        universal = {"checkpoint": {"load_universal": True}}
        source = folder / f"adam{stage}" / "universal"
        refuses(functools.partial(load, Run(stage, **universal), source), "not written by S3", '"s3_from_adam": true')
        run = Run(stage, params={"s3_from_adam": True}, **universal)
        ours = hyperparameters(run)
        load(run, source)
        saved = torch.load(folder / f"adam{stage}.pt", weights_only=True)
        close(run.weights(), saved["weights"], rtol=0.0, atol=0.0)
        close(run.state(STATES[0]), saved[STATES[0]], rtol=0.0, atol=0.0)
        close(run.state(STATES[1]), {key: v.sqrt() for key, v in saved[STATES[1]].items()}, rtol=0.0, atol=0.0)
        assert hyperparameters(run) == ours
        train(run, BEFORE, BEFORE + AFTER)
        source = folder / f"stage{stage}" / "universal"
        refuses(functools.partial(load, Run(stage, **ADAM, **universal), source), "written by S3", "AdamW")


def checks(folder: Path) -> dict[str, Callable[[], None]]:
    """The checks of this file; on one rank only those of loading what two ranks wrote."""
    found = {name: check for name, check in globals().items() if name.startswith("check_")}
    if dist.get_world_size() == 1:
        found = {name: check for name, check in found.items() if "universal" in name}
    return {name: functools.partial(check, folder) for name, check in found.items()}
