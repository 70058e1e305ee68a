"""The worker's checks of saving and loading.

The run on 2 ranks leaves universal checkpoints behind, which those on 1 and on 4 ranks go on from.
"""

import functools
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.checkpoint import ds_to_universal
from deepspeed.utils import logger
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from s3_megatron.engines.deepspeed import activity
from s3_megatron.errors import S3Error
from s3_megatron.optim import S3
from tests.engines.deepspeed.harness import (
    ALONE,
    DECAY,
    FLOAT32_ACCUMULATION,
    LR,
    STATES,
    Net,
    Reference,
    Run,
    close,
    equal,
    gradients,
    groups,
    logged,
    same,
)
from tests.engines.deepspeed.window import OLD, ZERO_OF_16_BIT
from tests.rank_checks import refuses, shared_folder

BEFORE, AFTER = 4, 3  # steps before a checkpoint, and after it
ADAM = {"optimizer": "AdamW", "params": {"torch_adam": True}}
ZERO_OF_ADAM = (1,) if OLD else (1, 3)  # of universal checkpoints, which ZeRO-3 of 0.17.6 cannot convert (limits.py)
# A weight that came through the model's own bfloat16, of which the largest here is below 2.
BIT16 = {"fp32": 0.0, "bf16": 2**-8}
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
LACKING = [name for name in ("stage2", "stage3") if not OLD or KINDS[name][0] < 3]
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


def refusal(run: Run, folder: Path) -> str:
    """The line with which loading ends."""
    try:
        load(run, folder)
    except S3Error as error:
        assert "\n" not in str(error)
        return str(error)
    raise AssertionError("loaded")


def advice(text: str) -> dict[str, bool]:
    """The arguments of load_checkpoint that an error's line advises."""
    (found,) = re.findall(r"(load_module_only|load_optimizer_states)=(True|False)", text)
    return {found[0]: found[1] == "True"}


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
        text = refusal(before, folder)
        assert "not written by S3" in text and '"s3_from_adam": true' in text
        equal(before.everything()[len(held) // 3 :], held[len(held) // 3 :])  # m and r
        load(before, folder, **advice(text))
        close(before.weights(), adam.weights(), rtol=0.0, atol=BIT16[precision])

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
        other = Run(stage, precision, **ADAM)
        train(other, 20, 21)
        text = refusal(other, folder)
        assert "written by S3" in text and "AdamW" in text
        load(other, folder, **advice(text))
        close(other.weights(), converted.weights(), rtol=0.0, atol=BIT16[precision])


def check_zero_3_loads_the_weights_that_are_requested(_: Path) -> None:
    """load_module_only, which AdamW's message advised, silently loaded nothing; load_optimizer_states=False took the
    weights of the checkpoint that ``latest`` names, whatever the tag (DeepSpeed issue 8499)."""
    folder, run = shared_folder(), Run(3)
    train(run, 0, 1)
    save(run, folder)
    weights = run.weights()
    train(run, 1, 2)
    run.engine.save_checkpoint(str(folder), tag="later")
    other = Run(3)
    before = other.everything()
    refuses(functools.partial(load, other, folder, load_module_only=True), "no weights in ZeRO-3", "load_optimizer_st")
    weights_alone = functools.partial(load, other, folder, load_optimizer_states=False)
    refuses(weights_alone, "(later)", "write saved into that file")
    equal(other.everything(), before)
    dist.barrier()
    (folder / "latest").unlink(missing_ok=True)
    dist.barrier()
    refuses(weights_alone, "there is no such file", "write saved into that file")
    dist.barrier()
    (folder / "latest").write_text("saved")
    dist.barrier()
    weights_alone()
    close(other.weights(), weights, rtol=0.0, atol=0.0)
    assert not any(state.any() for name in STATES for state in other.state(name).values())
    other.step(gradients(3))


def check_other_hyperparameters_are_refused(_: Path) -> None:
    """DeepSpeed went on with the checkpoint's p where the configuration had another, and logged one line;
    Megatron refused it. The decay is no part of the state: the checkpoint's goes on, with a line."""
    folder = shared_folder()
    save(Run(2), folder)
    changed = {"p": 2.0, "beta": 0.9, "nesterov": False}
    for name, value in changed.items():
        run = Run(2, params={name: value})
        refuses(functools.partial(load, run, folder), f"asks for {name}", '"s3_override_hyperparameters": true')
    run = Run(2, params={**changed, "s3_override_hyperparameters": True})
    load(run, folder)
    assert {(g["p"], g["betas"], g["nesterov"]) for g in run.s3.param_groups} == {(2.0, (0.9, 0.9), False)}
    # An object has no configuration that could override: the checkpoint's values count, as in plain PyTorch.
    net = Net()
    run = Run(2, net=net, client=S3(groups(net), lr=LR, p=2.0))
    load(run, folder)
    assert {group["p"] for group in run.s3.param_groups} == {3.0}
    lines: list[str] = []
    original, logger.warning = logger.warning, lines.append
    try:
        load(Run(2), folder)
        assert not any("goes on with" in line for line in lines)
        load(Run(2, params={"weight_decay": 0.5}), folder)
    finally:
        logger.warning = original
    assert any(f"checkpoint's weight_decay: [{DECAY}]" in line and "[0.5]" in line for line in lines), lines


def check_another_configuration_is_logged(_: Path) -> None:
    """Another clipping, batch or schedule than the checkpoint's passed without a line: DeepSpeed saves it, and compares
    nothing. Of a configuration that was given as a path it saved the path alone."""
    folder, by_path = shared_folder(), shared_folder()
    warmup = {"type": "WarmupLR", "params": {"warmup_num_steps": 10}}
    first = Run(2, scheduler=warmup)
    save(first, folder)
    if dist.get_rank() == 0:
        (by_path / "ds.json").write_text(json.dumps(first.engine.config))
    dist.barrier()
    net = Net()
    engine, *_ = deepspeed.initialize(model=net, model_parameters=groups(net), config=str(by_path / "ds.json"))
    engine.save_checkpoint(str(by_path), tag="saved")
    lines: dict[str, list[str]] = {}
    longer = {"type": "WarmupLR", "params": {"warmup_num_steps": 20}}
    for saved in (folder, by_path):
        for name, more in (("same", {"scheduler": warmup, "steps_per_print": 7}), ("other", {"scheduler": longer})):
            with logged() as all_lines:
                load(Run(2, clip=0.5 * (name == "other"), **more), saved)
            lines[f"{name} {saved}"] = [line for line in all_lines if "another DeepSpeed configuration" in line]
    # After the last collective: a rank that fails alone would leave the other waiting.
    for name, found in lines.items():
        assert len(found) == (name.startswith("other") and dist.get_rank() == 0), lines
        for line in found:
            assert "gradient_clipping 0" in line and ", here 0.5" in line
            assert "scheduler.params.warmup_num_steps 10, here 20" in line


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
        spoil(run.net)
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


def spoil(net: Net) -> None:
    """Give what is not trained other values."""
    with deepspeed.zero.GatheredParameters([net.frozen], modifier_rank=0):
        net.frozen.data.fill_(7.0)
    net.seen.fill_(7.0)


def check_universal_checkpoints_bring_what_is_not_trained(folder: Path) -> None:
    """Frozen weights and buffers silently stayed as the new process had made them (AdamW's still do)."""
    for name in UNIVERSAL:
        for kind, lacking in (("universal", False), ("lacking", True)):
            if lacking and name not in LACKING:
                continue
            run = make(name, checkpoint={"load_universal": True})
            spoil(run.net)
            with logged() as lines:
                load(run, folder / name / kind)
            with deepspeed.zero.GatheredParameters([run.net.frozen]):
                values = {*run.net.frozen.tolist(), *run.net.seen.tolist()}
            assert values == ({7.0} if lacking else {1.0, 2.0, 4.0}), (name, values)
            named = [line for line in lines if "lacks frozen, seen, not trained here" in line]
            assert len(named) == (lacking and dist.get_rank() == 0), (name, lines)


def take_out_what_is_not_trained(folder: Path, name: str) -> None:
    """Copy a universal checkpoint without frozen weights and buffers, as exclude_frozen_parameters=True saves it."""
    copy = folder / name / "lacking"
    shutil.copytree(folder / name / "universal", copy)
    for file in copy.glob("saved/*model_states.pt"):
        state = torch.load(file, weights_only=False)
        state["module"] = {key: value for key, value in state["module"].items() if key not in ("frozen", "seen")}
        state["frozen_param_shapes"] = state["frozen_param_fragments"] = None
        torch.save(state, file)


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
            if name in LACKING:
                take_out_what_is_not_trained(folder, name)
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
        plain = Run(stage, **universal)
        text = refusal(plain, source)
        assert "not written by S3" in text and '"s3_from_adam": true' in text
        follow(plain, text, folder / f"adam{stage}")
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
        adam = Run(stage, **ADAM, **universal)
        text = refusal(adam, source)
        assert "written by S3" in text and "AdamW" in text
        follow(adam, text, folder / f"stage{stage}")


def follow(run: Run, text: str, folder: Path) -> None:
    """Do what a refusal of the universal checkpoint in ``folder`` advises: the weights alone are the saved ones."""
    assert "of the ordinary checkpoint" in text and "without load_universal" in text
    stage = int(run.engine.zero_optimization_stage())
    assert ("on as many ranks" in text) == (stage == 3)
    if stage == 3 and dist.get_world_size() != 2:
        return
    run = Run(stage, **({} if isinstance(run.s3, S3) else ADAM))
    train(run, 20, 21)
    load(run, folder, **advice(text))
    saved = torch.load(folder.with_suffix(".pt"), weights_only=True)
    close(run.weights(), saved["weights"], rtol=0.0, atol=0.0)


def checks(folder: Path) -> dict[str, Callable[[], None]]:
    """The checks of this file."""
    found = {name: check for name, check in globals().items() if name.startswith("check_")}
    return {name: functools.partial(check, folder) for name, check in found.items()}
