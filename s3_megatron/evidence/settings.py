"""Whether optimizers take what an experiment sets, before any run: a run with a wrong value may come after hours."""

from torch.nn import Parameter

from s3_megatron.errors import S3Error, first_line
from s3_megatron.evidence import contenders
from s3_megatron.evidence.experiments import Experiment
from s3_megatron.evidence.stack import Model, initial

TINY = Model(layers=1, width=8, heads=1, length=8)


def check(experiment: Experiment) -> None:
    """Build every contender with each value of each of its settings, over a few weights.

    Raises:
        S3Error: its optimizer refuses one, or its library is missing.
    """
    setup = next(iter(experiment.setups.values()))
    for name, entry in experiment.contenders.items():
        changes = [{key: value} for key, values in entry.sweep.items() for value in values]
        for change in [{}, *changes]:
            settings, weights = {**entry.settings, **change}, initial(TINY, 0)
            length = {"total_steps": setup.steps} if contenders.CONTENDERS[entry.optimizer].takes_length else {}
            parameters: contenders.Weights = {key: Parameter(weight) for key, weight in weights.items()}
            decay = setup.decay / entry.rates[0]
            try:
                contenders.build(entry.optimizer, parameters, entry.rates[0], decay, {**settings, **length})
            except Exception as error:  # each library has its own
                reason = f"{entry.optimizer} says: {first_line(error)}"
                raise S3Error(f"contenders.{name}: with {settings} {reason}") from error
