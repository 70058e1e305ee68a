"""Frozen weights and buffers: DeepSpeed loads neither from a universal checkpoint.

Every host symbol named here was read in deepspeed 0.19.8.
"""

import logging
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import log_dist
from torch import Tensor

from s3_megatron.engines.deepspeed.layout import is_stage3, model_groups

_SHOWN = 5  # names in the line about what could not be loaded


def load(engine: Any, folder: Path) -> None:
    """Load what ``engine``'s model has and does not train, in place, from the universal checkpoint in ``folder``.

    ``_load_checkpoint`` (runtime/engine.py) leaves out the model's own state, because checkpoint/ds_to_universal.py
    keeps what is trained elsewhere. The files of that state are in the folder all the same. What is not in them keeps
    the value that this process gave it, and one line names it.
    """
    model = engine.module
    trained = {id(param) for group in model_groups(engine.optimizer) for param in group}
    saved = model.state_dict().keys()
    wanted = {name: param for name, param in model.named_parameters() if id(param) not in trained}
    wanted |= {name: buffer for name, buffer in model.named_buffers() if name in saved}
    found = _read(engine, folder) if wanted else {}
    missing = []
    for name, tensor in wanted.items():
        value = found.get(name)
        if value is None or value.numel() != getattr(tensor, "ds_numel", tensor.numel()):
            missing.append(name)
            continue
        with torch.no_grad(), deepspeed.zero.GatheredParameters([tensor], modifier_rank=0):
            tensor.copy_(value.view(tensor.shape))
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        log_dist(
            f"the universal checkpoint in {folder} lacks {', '.join(missing[:_SHOWN])}{more}, not trained here: they "
            "stay as this run made them; give them their values before deepspeed.initialize",
            ranks=[0],
            level=logging.WARNING,
        )


def _read(engine: Any, folder: Path) -> dict[str, Tensor]:
    """Read the model's own state: whole, under ZeRO 1 and 2; under ZeRO-3 a fragment of each frozen weight a rank.

    Empty where it is split over model-parallel ranks as well.
    """
    if list(folder.glob("*mp_rank_01*_model_states.pt")):
        return {}
    kind = "zero_pp_rank_*_" if is_stage3(engine.optimizer) else ""
    files = sorted(folder.glob(f"{kind}mp_rank_00_model_states.pt"), key=lambda file: (len(file.name), file.name))
    # As the engine read the first of them a moment ago.
    states = [engine.checkpoint_engine.load(str(file), map_location="cpu") for file in files]
    if not states:
        return {}
    found: dict[str, Tensor] = {name: value for name, value in states[0]["module"].items() if torch.is_tensor(value)}
    if is_stage3(engine.optimizer):
        for name, shape in (states[0].get("frozen_param_shapes") or {}).items():
            fragments = [state["frozen_param_fragments"][name].view(-1) for state in states]
            found[name] = torch.cat(fragments)[: shape.numel()]
    return found
