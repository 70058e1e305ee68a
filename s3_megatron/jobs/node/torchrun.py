"""torchrun that leaves SIGTERM to the ranks and says in a file which rank failed, and of what.

``python -m s3_megatron.jobs.node.torchrun <torchrun's arguments>``. A cluster announces the end of a job by SIGTERM to
every process. Megatron's ranks then save (--exit-signal-handler); torchrun of its own would kill them after
TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds, and a timeout long enough for a save would make every failure wait as long.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s3_megatron.files import write_file
from s3_megatron.jobs.node import verdict
from s3_megatron.machine import node_name

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

_PASSED_ON = (verdict.CONFIGURATION, verdict.BAD_NODES)
# What ends a rank from outside or from below; the others then fail of the connection that it left behind.
_ROOT_SIGNALS = ("SIGKILL", "SIGSEGV", "SIGBUS", "SIGABRT", "SIGILL", "SIGFPE")


def main() -> None:
    """Run torchrun with ``sys.argv``'s arguments.

    Where ranks fail, or torchrun itself does, writes every failure of this node to $S3_FAILURES, the first first, as a
    JSON list of {rank, local_rank, host, exitcode, signal, message, time}, and exits with 1, or with the first one's
    exit code where that is 2 (configuration error) or 3 (bad nodes).
    """
    # A handler that does nothing, and not SIG_IGN, which the ranks would inherit. Before torch, whose import takes
    # seconds.
    signal.signal(signal.SIGTERM, lambda *_: None)
    from torch.distributed import run  # torch 2.13
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    args = run.parse_args(["--signals-to-handle", "SIGINT,SIGHUP,SIGQUIT", *sys.argv[1:]])
    node = os.environ.get("SLURM_NODEID")
    if node is not None and not args.standalone:
        # Of its own torchrun guesses who is the host, and where the host finds its port taken it becomes a client of
        # whatever listens there, and waits (torch 2.13, c10d_rendezvous_backend._create_tcp_store).
        args.rdzv_conf = ",".join(filter(None, (args.rdzv_conf, f"is_host={int(node) == 0}")))
    try:
        run.run(args)
    except ChildFailedError as failed:
        print(failed, file=sys.stderr, flush=True)
        failures = sorted((_describe(rank, failure) for rank, failure in failed.failures.items()), key=_began)
        _write(failures)
        code = failures[0]["exitcode"]
        sys.exit(code if code in _PASSED_ON else 1)
    except Exception as error:  # torchrun's own, such as a rendezvous that does not come about
        _write([_own(error)])
        raise
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Python gives up its handlers before its last second


def _write(failures: list[dict[str, Any]]) -> None:
    if path := os.environ.get(verdict.FAILURES):
        write_file(Path(path), json.dumps(failures, indent=2).encode())


def _own(error: Exception) -> dict[str, Any]:
    """Describe what ended torchrun before any rank failed."""
    first = next(iter(str(error).strip().splitlines()), "an exception without a text")
    return {
        "rank": None,
        "local_rank": None,
        "host": node_name(),
        "exitcode": 1,
        "signal": None,
        "message": f"torchrun: {type(error).__name__}: {first}",
        "time": time.time(),
    }


def _describe(rank: int, failure: "ProcessFailure") -> dict[str, Any]:
    return {
        "rank": rank,
        "local_rank": failure.local_rank,
        "host": node_name(),
        "exitcode": failure.exitcode,
        "signal": failure.signal_name() if failure.exitcode < 0 else None,
        "message": _message(failure),
        "time": _time(failure),
    }


def _message(failure: "ProcessFailure") -> str:
    """Give the first line of the rank's exception; of S3Error, which is written for people, without its name."""
    if isinstance(failure.message, dict):
        lines = str(failure.message.get("message", "")).strip().splitlines() or ["an exception without a text"]
        return lines[0].removeprefix("S3Error: ")
    if failure.exitcode < 0:
        return f"ended by {failure.signal_name()}"
    return f"ended with exit code {failure.exitcode}; its log has the reason"


def _time(failure: "ProcessFailure") -> float:
    """Give the seconds since 1970 at which the rank wrote its exception, or was found ended.

    torchelastic's own timestamp has whole seconds, in which every other rank fails, too.
    """
    try:
        return Path(failure.error_file).stat().st_mtime
    except OSError:
        return float(failure.timestamp)


def _began(failure: dict[str, Any]) -> float:
    """Order failures: who was killed comes before the errors that came of it, which torchrun sees at the same time.

    It looks every 0.1 s; ranks that it kills itself, for want of an answer to SIGTERM, come 30 s later.
    """
    return failure["time"] - (2 if failure["signal"] in _ROOT_SIGNALS else 0)


if __name__ == "__main__":
    main()
