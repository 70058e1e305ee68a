"""Megatron-Bridge, which asks the optimizer's configuration to build the optimizer."""

from dataclasses import dataclass
from typing import Any

from megatron.core import optimizer as host
from megatron.core.optimizer import MegatronOptimizer

from s3_megatron.engines.megatron.config import S3Config, SoftMuonConfig, SoftSignumConfig, SpecOptimizerConfig
from s3_megatron.engines.megatron.install import install


class BridgeConfig(SpecOptimizerConfig):
    """A configuration that Megatron-Bridge (0.6.2, training/optim.py) can use."""

    def finalize(self) -> None:
        """Derive again what follows from the fields; Megatron-Bridge changes some and then calls this."""
        self.__post_init__()

    def provide(self, model_chunks: list[Any], **settings: Any) -> MegatronOptimizer:
        """Build the optimizer for ``model_chunks``.

        ``settings`` are those of ``megatron.core.optimizer.get_megatron_optimizer``. Installs ours in this process.
        """
        install()
        optimizer: MegatronOptimizer = host.get_megatron_optimizer(self, model_chunks, **settings)
        return optimizer


@dataclass
class S3OptimizerConfig(S3Config, BridgeConfig):  # type: ignore[misc, valid-type]
    """OptimizerConfig (megatron-core 0.17.1 to 0.19.2) with S3's own hyperparameters; ``optimizer`` is "s3"."""


@dataclass
class SoftSignumOptimizerConfig(SoftSignumConfig, BridgeConfig):  # type: ignore[misc, valid-type]
    """OptimizerConfig (megatron-core 0.19.2) with SoftSignum's own hyperparameters; ``optimizer`` is "softsignum".

    ``softsignum_total_steps`` is the length of the run, which a configuration of the optimizer does not know.
    """


@dataclass
class SoftMuonOptimizerConfig(SoftMuonConfig, BridgeConfig):  # type: ignore[misc, valid-type]
    """OptimizerConfig (megatron-core 0.19.2) with SoftMuon's own hyperparameters; ``optimizer`` is "softmuon".

    The fields of what moves the rest are in it, too. ``softmuon_total_steps`` is the length of the run.
    ``use_distributed_optimizer`` must be off, in the configuration of DDP, too: gradients have to come whole;
    ``use_layer_wise_distributed_optimizer`` then gives each matrix to one rank.
    """
