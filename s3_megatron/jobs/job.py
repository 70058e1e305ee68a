"""A recipe on a cluster, with what follows from both."""

from dataclasses import dataclass

from s3_megatron.jobs.cluster import Cluster
from s3_megatron.jobs.recipe import Recipe


@dataclass(frozen=True)
class Job:
    """What ``submit``, ``launch`` and ``check`` are about."""

    recipe: Recipe
    cluster: Cluster

    @property
    def ranks(self) -> int:
        """The number of ranks, one for each GPU: Megatron's world size."""
        return self.recipe.layout.nodes * self.cluster.ranks_per_node

    @property
    def model_parallel(self) -> int:
        """The number of ranks that hold one copy of the model and share one sequence."""
        layout = self.recipe.layout
        return layout.tensor * layout.pipeline * layout.context

    @property
    def data_parallel(self) -> int:
        """The number of copies that share a batch, rounded down where the ranks do not divide."""
        return self.ranks // self.model_parallel

    @property
    def micro_batch_size(self) -> int:
        """How many sequences a rank takes at once."""
        schedule = self.recipe.schedule
        return schedule.micro_batch_size or max(1, schedule.global_batch_size // max(1, self.data_parallel))

    @property
    def rehearsed(self) -> bool:
        """Whether the ranks are processes on CPUs."""
        return self.cluster.accelerator == "cpu"
