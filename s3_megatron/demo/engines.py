"""What the demonstration shows of an engine: its title, whose versions count, and where its results go."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Engine:
    """What trains, as a person reads it."""

    title: str
    packages: tuple[str, ...]
    results: str  # folder under runs/

    def results_of(self, optimizer: str) -> str:
        """The folder of a demonstration of ``optimizer``: S3's has no more to its name."""
        return self.results if optimizer == "s3" else f"{self.results}-{optimizer}"


ENGINES = {
    "megatron": Engine(
        title="Megatron's distributed optimizer",
        packages=("torch", "megatron-core"),
        results="demo",
    ),
    "deepspeed": Engine(
        title="DeepSpeed's ZeRO 1",
        packages=("torch", "megatron-core", "deepspeed"),
        results="demo-deepspeed",
    ),
}
