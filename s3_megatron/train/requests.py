"""What a person asks of a running job by files in its folder, and how the job says that it is done.

``touch $S3_RUN_DIR/SAVE`` saves a checkpoint and goes on; ``touch $S3_RUN_DIR/STOP`` saves, ends, and does not come
back. ``FINISHED`` is there once the last iteration is done, ``ENDED`` once a job has stopped for good before it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import megatron.training.training as host
import torch
import torch.distributed as dist
from megatron.training import get_args, print_rank_0

from s3_megatron.run_folder import RunFolder, of_this_job
from s3_megatron.swap import SymbolSwap

_SAVE, _STOP = 1, 2  # bits


@contextmanager
def obeyed() -> Iterator[None]:
    """Obey the files in $S3_RUN_DIR, if that is set, while the body runs Megatron's ``pretrain`` (0.19.2)."""
    if (run := of_this_job()) is None:
        yield
        return
    requests = _Requests(run)
    swap = SymbolSwap("this megatron-core")
    swap.replace(host, "checkpoint_and_decide_exit", requests.checkpoint_and_decide_exit)
    try:
        yield
    except SystemExit as stop:  # Megatron's way to end before the last iteration
        if not stop.code:
            requests.write_ended()
        raise
    finally:
        swap.undo()
    requests.write_finished()


class _Requests:
    """The files of one run."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._iteration = 0
        self._stopped = False
        self._obeyed: dict[Path, int] = {}  # requests that cannot be removed, and their times

    def checkpoint_and_decide_exit(self, original: Callable[..., bool]) -> Callable[..., bool]:
        """Wrap ``megatron.training.training.checkpoint_and_decide_exit`` (0.19.2), called after every iteration."""

        def wrapped(
            model: Any, optimizer: Any, scheduler: Any, iteration: int, operations: Any, context: Any, data: Any
        ) -> bool:
            args = get_args()
            self._iteration = iteration
            asked = self._asked() if iteration % args.log_interval == 0 else 0
            # Before the original: an iteration that ends the run anyway may be the one that STOP came in.
            self._stopped = bool(asked & _STOP)
            done = original(model, optimizer, scheduler, iteration, operations, context, data)
            # Ends save, and so does the interval.
            saved = done or bool(args.save_interval and iteration % args.save_interval == 0)
            if asked and args.save and not saved:
                host.save_checkpoint_and_time(
                    iteration, model, optimizer, scheduler, operations, context, train_data_iterator=data
                )
            if asked & _SAVE:
                print_rank_0(f"the file SAVE was obeyed at iteration {iteration}")
                self._remove(self._run.save_request)
            return done or self._stopped

        return wrapped

    def _asked(self) -> int:
        """Look, on rank 0 alone, which sees what all others might see a moment later, and broadcast it."""
        bits = 0
        if dist.get_rank() == 0:
            bits = _SAVE * self._is_there(self._run.save_request) | _STOP * self._is_there(self._run.stop_request)
        asked = torch.tensor([bits], dtype=torch.int32, device="cuda")
        dist.broadcast(asked, src=0)
        return int(asked.item())

    def write_ended(self) -> None:
        """Write ENDED if the run was asked to stop; by now an asynchronous save is on the disk, too."""
        if self._stopped and dist.get_rank() == 0:
            self._run.end(f"stopped by the file STOP at iteration {self._iteration}")
            self._remove(self._run.stop_request)  # or it would stop the run that a person resumes

    def write_finished(self) -> None:
        """Write FINISHED if ``pretrain`` came to the last iteration, now or before it was started again."""
        args = get_args()
        iteration = max(self._iteration, args.iteration)
        if dist.get_rank() == 0 and not args.skip_train and iteration >= args.train_iters:
            self._run.finish(iteration)

    def _is_there(self, request: Path) -> bool:
        with suppress(OSError):
            return request.stat().st_mtime_ns != self._obeyed.get(request)
        return False

    def _remove(self, request: Path) -> None:
        """Remove an obeyed request; one that is another's, or a folder, is passed over until it is touched again."""
        if dist.get_rank() != 0:
            return
        try:
            request.unlink(missing_ok=True)
        except OSError as error:
            print(f"{request} was obeyed and cannot be removed: {error.strerror}", flush=True)
            with suppress(OSError):
                self._obeyed[request] = request.stat().st_mtime_ns
