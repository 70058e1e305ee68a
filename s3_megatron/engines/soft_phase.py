"""Where a soft phase begins, in a line that the hosts show: the optimizer's own is at INFO, which both hide."""

import logging
from collections.abc import Callable

from s3_megatron.optim.relaxed import RelaxedOptimizer, log_on_first_rank


def announce(optimizer: RelaxedOptimizer, end_step: Callable[[], None]) -> None:
    """Call ``end_step``, which ends a step of ``optimizer``; rank 0 logs the soft phase that it begins."""
    was_hard = optimizer.schedule is None
    end_step()
    schedule = optimizer.schedule
    if not was_hard or schedule is None or logging.getLogger(RelaxedOptimizer.__module__).isEnabledFor(logging.INFO):
        return
    last = schedule.tau(schedule.first + schedule.length, optimizer.param_groups[0]["tmax"])
    log_on_first_rank(
        logging.WARNING,
        f"{optimizer.spec.title} is soft from step {schedule.first + 1} on, for {schedule.length} steps, down to a tau "
        f"of {last:.4g}: the momentum has the median {schedule.mu:.4g} and the deviation {schedule.sigma:.4g}",
    )
