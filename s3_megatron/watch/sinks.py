"""Where events go beside the metrics file: TensorBoard and W&B."""

from typing import Any, Protocol

from s3_megatron.watch.events import Event, Train


class Sink(Protocol):
    """Takes every event of a run, in the process that writes them; ``watch.file.Writer`` is one."""

    def write(self, event: Event) -> None:
        """Take ``event``."""


class TensorBoard:
    """Writes update sizes to a SummaryWriter; losses and rates a training loop logs by itself."""

    def __init__(self, writer: Any) -> None:
        """Write to ``writer``, a ``torch.utils.tensorboard.SummaryWriter``."""
        self._writer = writer

    def write(self, event: Event) -> None:
        """Write the update sizes of an iteration."""
        if isinstance(event, Train):
            for name, value in update_sizes(event).items():
                self._writer.add_scalar(name, value, event.iteration)


class WandB:
    """Writes update sizes to W&B; losses and rates a training loop logs by itself."""

    def __init__(self, run: Any) -> None:
        """Write to ``run``, what ``wandb.init`` returns, or the module ``wandb`` after it."""
        self._run = run

    def write(self, event: Event) -> None:
        """Write the update sizes of an iteration."""
        if isinstance(event, Train) and (sizes := update_sizes(event)):
            self._run.log(sizes, event.iteration)


def mirrors(board: Any, wandb: Any) -> list[Sink]:
    """Make sinks of those of a SummaryWriter and a run of W&B that are there."""
    return [kind(target) for kind, target in ((TensorBoard, board), (WandB, wandb)) if target is not None]


def update_sizes(event: Train) -> dict[str, float]:
    """Give the update sizes that are known: ``update_mean``, of one among several optimizers ``update_mean/NAME``."""
    sizes = event.updates.named()
    for name, updates in event.optimizers.items():
        sizes |= {f"{size}/{name}": value for size, value in updates.named().items()}
    return {name: value for name, value in sizes.items() if value is not None}
