"""transformers fills "auto" in a DeepSpeed configuration with what its Trainer has for Adam."""

import functools
import logging
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from s3_megatron.engines.imports import AfterImport
from s3_megatron.machine import is_first_rank
from s3_megatron.optim import registry
from s3_megatron.optim.spec import Spec
from s3_megatron.swap import SymbolSwap

logger = logging.getLogger(__name__)

_MODULE = "transformers.integrations.deepspeed"
_BETAS, _EPS = "optimizer.params.betas", "optimizer.params.eps"
_OF_ADAM = [0.9, 0.999]  # TrainingArguments' adam_beta1 and adam_beta2 (transformers 5.23), where no one sets them


class TrainerConfig:
    """Keeps the betas of transformers' Trainer out of S3's params, from now on or from transformers' import on."""

    def __init__(self) -> None:
        """Replace nothing yet."""
        self._swap = SymbolSwap("this transformers")
        self._waiting = AfterImport(_MODULE, self._replace)

    def watch(self) -> None:
        """Start."""
        module = sys.modules.get(_MODULE)
        if module is None:
            sys.meta_path.insert(0, self._waiting)
        else:
            self._replace(module)

    def leave(self) -> None:
        """Put back what was replaced."""
        self._swap.undo()
        if self._waiting in sys.meta_path:
            sys.meta_path.remove(self._waiting)

    def _replace(self, module: ModuleType) -> None:
        self._swap.replace(module.HfTrainerDeepSpeedConfig, "fill_match", fill_match)


def fill_match(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap ``HfTrainerDeepSpeedConfig.fill_match`` (transformers 5.23, integrations/deepspeed.py).

    It fills an "auto", or notes that a value is another than the Trainer's, which ends the run later. Of S3's betas it
    does neither: "auto" becomes S3's default unless ``adam_beta1`` or ``adam_beta2`` is set, and a pair stays. Nor of
    an eps that is no Adam's.
    """

    @functools.wraps(original)
    def fill_match(self: Any, ds_key_long: str, hf_val: Any, *args: Any, **kwargs: Any) -> None:
        spec = registry.find(self.get_value("optimizer.type"))
        keeps_betas = ds_key_long == _BETAS and not (self.is_auto(_BETAS) and list(hf_val) != _OF_ADAM)
        if spec is None or not (keeps_betas or (ds_key_long == _EPS and _has_eps(spec))):
            original(self, ds_key_long, hf_val, *args, **kwargs)
        elif self.is_auto(ds_key_long):
            params, name = self.find_config_node(ds_key_long)
            del params[name]
            if is_first_rank():
                logger.warning(
                    f'"auto" for the {name} of {spec.title} is its own default: the Trainer has that of Adam'
                )

    return fill_match


def _has_eps(spec: Spec) -> bool:
    return any(each.name == "eps" for each in spec.hyperparameters)
