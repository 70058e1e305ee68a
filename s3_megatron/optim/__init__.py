"""S3 itself: the optimizer, and Algorithm 1 for readers; and SoftSignum and SoftMuon, its relatives.

The classes are imported when they are asked for: who reads the Specs alone, as recipes do, has no torch.
"""

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from s3_megatron.optim import registry
from s3_megatron.optim.state import EXP_AVG, EXP_AVG_ROOT, from_adam_state, is_marked

if TYPE_CHECKING:
    from s3_megatron.optim.engine_optimizer import EngineOptimizer
    from s3_megatron.optim.model_parts import softmuon_groups
    from s3_megatron.optim.s3 import S3
    from s3_megatron.optim.softmuon import SoftMuon
    from s3_megatron.optim.softsignum import SoftSignum

__all__ = [
    "EXP_AVG",
    "EXP_AVG_ROOT",
    "S3",
    "EngineOptimizer",
    "SoftMuon",
    "SoftSignum",
    "from_adam_state",
    "is_s3_state",
    "softmuon_groups",
]


_LATE = {
    "S3": "s3",
    "EngineOptimizer": "engine_optimizer",
    "SoftMuon": "softmuon",
    "SoftSignum": "softsignum",
    "softmuon_groups": "model_parts",
}


def is_s3_state(param_groups: Sequence[dict[str, Any]]) -> bool:
    """Whether all saved param groups carry S3's mark."""
    return is_marked(param_groups, registry.S3)


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LATE[name]}"), name)
