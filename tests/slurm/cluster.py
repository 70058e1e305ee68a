"""A real SLURM cluster on this one machine, driven as a person drives one: with sbatch, scontrol, scancel."""

import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

SCRIPTS = Path(__file__).with_name("machines")
CANNOT = 69  # up.sh: this machine cannot carry the cluster
OVER = frozenset(("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"))


class Unavailable(RuntimeError):
    """This machine cannot carry the cluster; the text says why, in one line."""


class Cluster:
    """Nodes node1 ... of 8 CPUs and 8 fake GPUs (h100); partitions gpu (default) and spot, which gpu pre-empts.

    What the times are set to: a requeued job starts again after 6 s, a dead node is noticed after 10 to 21 s, KILL
    follows TERM after 10 s, time limits and --signal are looked at every 30 s.
    """

    def __init__(self, folder: Path, nodes: int = 4) -> None:
        self.folder = folder
        self.nodes = nodes
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        self.env = {
            **inherited,
            "SLURM_TEST_DIR": str(folder),
            "SLURM_CONF": str(folder / "etc/slurm.conf"),
            "NODES": str(nodes),
        }

    def up(self, fresh: bool = False) -> None:
        """Bring every node up that is not, or, with ``fresh``, all of a new cluster.

        Raises:
            Unavailable: where this machine cannot carry it.
        """
        done = self.run(str(SCRIPTS / "up.sh"), check=False, FRESH=str(int(fresh)))
        if done.returncode == CANNOT:
            raise Unavailable(done.stderr.strip())
        assert done.returncode == 0, done.stdout + done.stderr

    def down(self) -> None:
        """End every process of the cluster; logs stay in the folder."""
        self.run(str(SCRIPTS / "down.sh"))

    def run(self, *argv: str, check: bool = True, timeout: float = 120, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a command outside of the nodes, as on a login node; with ``check`` a failure fails the test."""
        done = subprocess.run(argv, env={**self.env, **env}, capture_output=True, text=True, timeout=timeout)
        assert not check or done.returncode == 0, f"{argv} exited {done.returncode}:\n{done.stdout}{done.stderr}"
        return done

    def submit(self, script: Path, *sbatch_args: str) -> str:
        """Submit a file; its job's id."""
        return self.run("sbatch", "--parsable", *sbatch_args, str(script)).stdout.strip()

    def field(self, job: str, name: str) -> str:
        """One field of ``scontrol show job``, "" if it is not there; the last one only if it has spaces."""
        found = re.search(rf"(?:^|\s){name}=(\S*)", self.run("scontrol", "show", "job", job).stdout)
        return found[1] if found else ""

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETING, COMPLETED, ..."""
        return self.field(job, "JobState")

    def restarts(self, job: str) -> int:
        """How many times the job was requeued and has started again."""
        return int(self.field(job, "Restarts"))

    def nodes_of(self, job: str) -> list[str]:
        """The nodes that the job has or had last, in order."""
        nodes = self.field(job, "NodeList")
        return [] if nodes in ("", "(null)") else self.run("scontrol", "show", "hostnames", nodes).stdout.split()

    def wait_for(self, predicate: Callable[[], object], seconds: float, what: str, logs: Path | None = None) -> None:
        """Wait until the predicate holds; if it never does, show the queue, the nodes and the ends of the logs."""
        end = time.monotonic() + seconds
        while not predicate():
            if time.monotonic() > end:
                raise AssertionError(f"not within {seconds:.0f} s: {what}\n{self._situation(logs)}")
            time.sleep(0.2)

    def wait_over(self, job: str, seconds: float, logs: Path | None = None) -> str:
        """Wait until the job has ended for good; its last state."""
        self.wait_for(lambda: self.state(job) in OVER, seconds, f"job {job} over", logs)
        return self.state(job)

    def _situation(self, logs: Path | None) -> str:
        queue = self.run("squeue", "--states=all", check=False).stdout
        nodes = self.run("sinfo", "--Node", "--long", check=False).stdout
        files = [self.folder / "log/slurmctld.log"]
        if logs is not None:
            files += sorted(path for path in logs.rglob("*") if path.is_file() and path.suffix in (".log", ".out"))
        ends = (f"== {file}\n" + "\n".join(file.read_text(errors="replace").splitlines()[-30:]) for file in files)
        return "\n".join((queue, nodes, *ends))

    def cancel(self, job: str) -> None:
        """Cancel a job, as its owner."""
        self.run("scancel", job)

    def poweroff(self, node: str) -> None:
        """End every process of a node at once; its peers see their connections closed."""
        self._node("poweroff", node)

    def crash(self, node: str) -> None:
        """End every process of a node at once; its peers see nothing."""
        self._node("crash", node)

    def exec(self, node: str, *argv: str) -> subprocess.CompletedProcess[str]:
        """Run a command on a node."""
        return self._node("exec", node, *argv)

    def _node(self, command: str, node: str, *argv: str) -> subprocess.CompletedProcess[str]:
        return self.run(str(SCRIPTS / "node.sh"), command, node, *argv)

    def revive(self) -> None:
        """Bring back the nodes that are dead or shut."""
        self.up()

    def clean(self) -> None:
        """No job in the queue, every node up and idle."""
        jobs = self.run("squeue", "--noheader", "--format=%A").stdout.split()
        if jobs:
            self.run("scancel", *jobs)
        self.revive()
        self.wait_for(lambda: not self.run("squeue", "--noheader").stdout, 40, "an empty queue")
        self.wait_for(self.all_idle, 20, "idle nodes")

    def all_idle(self) -> bool:
        """Whether every node waits for a job."""
        states = self.run("sinfo", "--noheader", "--Node", "--partition=gpu", "--format=%T").stdout.split()
        return states == ["idle"] * self.nodes
