"""Ends a command, and whatever it has started, when the program that wants it is gone.

``python -m s3_megatron.jobs.guard SECONDS COMMAND...``. Standard input is a pipe from that program, which closes with
it however it ends, SIGKILL included. The command is then asked to end, by SIGTERM, and killed after SECONDS.
"""

import select
import signal
import subprocess
import sys
from contextlib import suppress

import psutil

from s3_megatron.jobs.node.processes import adopt_orphans, kill_descendants


def main() -> int:
    """Run the command of ``sys.argv``; returns its exit code, as a shell gives it."""
    asked: list[int] = []
    # Only noted: an exception between the start of the command and its name here would lose it.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: asked.append(number))
    patience, command = float(sys.argv[1]), sys.argv[2:]
    adopt_orphans()
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    # Nothing is ever written into the pipe: it is readable once it is closed.
    while child.poll() is None and not asked and not select.select([0], [], [], 0.1)[0]:
        pass
    # Before the end: macOS gives orphans to its first process, and they could not be found afterwards.
    family = psutil.Process().children(recursive=True)
    if child.poll() is None:
        child.terminate()
        with suppress(subprocess.TimeoutExpired):
            child.wait(patience)
    child.kill()
    code = child.wait()
    for process in family:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    kill_descendants()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
