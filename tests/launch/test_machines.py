"""Odd machines: the commands of a first run and the demonstration work wherever a program of their kind can run.

Each machine is this one in namespaces of its own (unshare), so it takes root. docs/machines.md is the table of them.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from s3_megatron.checkpoints.whole import newest
from s3_megatron.data import inspect
from s3_megatron.demo.engines import ENGINES
from tests.terminal import lives

ROOT = Path(__file__).resolve().parents[2]
SITE_PACKAGES = sysconfig.get_path("purelib")
pytestmark = [
    pytest.mark.machines,
    pytest.mark.skipif(os.geteuid() != 0, reason="mounts and user ids of its own take root"),
]

# The commands of a first run, each as a person types it; a step by AdamW, and S3's without the compiled kernel. Beside
# them `make demo` until it has printed its first iteration, and then SIGTERM.
COMMANDS = """
set -eu
"$python" -m s3_megatron.demo --engine "$engine" >demo.log 2>&1 &
demo=$!
trap 'kill $demo 2>/dev/null || true' EXIT
{
    while kill -0 $demo && ! grep -aq "S3: iteration 1 of" demo.log; do sleep 0.2; done
    kill $demo
} 2>/dev/null &
"$python" "$folder/step.py" >"$folder/step.log" 2>&1
"$python" -m s3_megatron.cli data prepare text.txt --output tokens --train-tokenizer --vocab-size 300
"$python" -m s3_megatron.cli launch gpt2_tiny --name first --set precision=fp32 --set schedule.train_iters=1 \
    --set schedule.lr_warmup_iters=0 --set schedule.eval_iters=0 --set schedule.global_batch_size=4 \
    --set model.num_layers=1 --set model.seq_length=32 --set model.vocab_size=512 --set data.mock=false \
    --set data.train=tokens --set data.validation=tokens --set data.tokenizer=sentencepiece \
    --set data.tokenizer_model=tokens.model
wait $demo || echo "the demonstration: $?"
"$python" -m s3_megatron.cli status runs/first
"$python" -m s3_megatron.cli runs
"""
STEP = """
import torch
from pathlib import Path
from s3_megatron.kernels.cpu import library
library.INSTALLED = Path("/nowhere")  # as installed without a compiler
from s3_megatron.optim import S3
for kind in (torch.optim.AdamW, S3):
    p = torch.nn.Parameter(torch.ones(64))
    p.grad = torch.ones(64)
    kind([p], lr=1e-2, weight_decay=0.1).step()
    assert 0.98 < p[0].item() < 1, (kind, p[0].item())
"""


@dataclass(frozen=True)
class Machine:
    """What is odd: commands before ours, unshare's options, environment; ``says`` is what the output must hold."""

    setup: str = ""
    unshare: tuple[str, ...] = ("--mount",)
    environment: Mapping[str, str | None] = field(default_factory=dict)
    folder: str = "work"
    says: tuple[str, ...] = ()
    runs_code: int = 0  # of `s3-megatron runs`, which comes last
    engine: str = "megatron"  # of the demonstration


READ_ONLY = """
for place in "$site" "$root"; do
    mount --bind "$place" "$place"
    mount -o remount,bind,ro "$place"
done
"""
NOEXEC = """
mount --bind /tmp /tmp
mount -o remount,bind,noexec /tmp
"""
# The loopback has 127.0.0.1, as every Linux gives it; the network has IPv6 alone.
IPV6 = """
ip link set lo up
ip -6 addr add fd00::9/128 dev lo nodad
hostname six.example
printf '::1 localhost\\n127.0.0.1 localhost\\nfd00::9 six.example\\n' >"$folder/hosts"
mount --bind "$folder/hosts" /etc/hosts
"""
NO_LIST = "is missing in the list of s3-megatron runs"
# Several oddities to a machine, where one cannot hide the other: a start of ranks takes most of the time.
MACHINES = {
    "no HOME, a user id without a name": Machine(
        unshare=("--user", "--map-user=12345", "--map-group=12345"),
        environment={"HOME": None, "USER": None, "LOGNAME": None},
        says=(NO_LIST, "set HOME, or XDG_STATE_HOME"),
        runs_code=2,
    ),
    "HOME and Python cannot be written, no TMPDIR, umask 077, another zone, no network but the loopback": Machine(
        # A demonstration writes where it stands, and in the checkout there says that it cannot.
        setup=READ_ONLY + 'umask 077; ip link set lo up; (cd "$root"; ! "$python" -m s3_megatron.demo)',
        unshare=("--mount", "--net"),
        environment={"HOME": "/proc/none", "TMPDIR": "/nowhere/tmp", "TZ": "Asia/Kathmandu"},
        says=(NO_LIST, "runs cannot be written: Read-only file system"),
        engine="deepspeed",
    ),
    "XDG folders cannot be written, the own name does not resolve": Machine(
        setup="hostname no-such-host.invalid",
        unshare=("--mount", "--uts"),
        environment={"XDG_STATE_HOME": "/proc/none", "XDG_CACHE_HOME": "/proc/none"},
        says=(NO_LIST, "name another folder in S3_MEGATRON_CACHE"),
    ),
    "ASCII without Python's UTF-8 mode, a folder with spaces and umlauts, relative XDG folders": Machine(
        environment={
            "LC_ALL": "C",
            "PYTHONUTF8": "0",
            "PYTHONCOERCECLOCALE": "0",
            "XDG_STATE_HOME": "x",
            "XDG_CACHE_HOME": "x",
        },
        folder="Größe und „mehr“",
    ),
    "/tmp mounted noexec, LC_ALL=C, IPv6 only": Machine(
        setup=IPV6 + NOEXEC,
        unshare=("--mount", "--net", "--uts"),
        environment={"XDG_CACHE_HOME": "/tmp/s3-megatron-noexec", "LC_ALL": "C"},
        says=("mounted noexec?",),
        engine="deepspeed",
    ),
}


@pytest.mark.parametrize("name", MACHINES)
def test_a_first_run(name: str, tmp_path: Path):
    machine = MACHINES[name]
    folder = tmp_path / machine.folder
    folder.mkdir()
    tmp_path.chmod(0o777)
    folder.chmod(0o777)
    (folder / "text.txt").write_text("Grüße aus Köln, sagt der Bär. " * 400, encoding="utf-8")
    (folder / "step.py").write_text(STEP)
    home = tmp_path / "home"
    home.mkdir(mode=0o777)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("XDG_", "S3_"))}
    environment |= {"HOME": str(home), "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {"CXX": f"bash {compiler(tmp_path)}", "python": sys.executable, "folder": str(folder)}
    environment |= {"site": SITE_PACKAGES, "root": str(ROOT), "engine": machine.engine}
    environment |= machine.environment
    done = subprocess.run(
        ["unshare", *machine.unshare, "bash", "-euc", f"{machine.setup}\n{COMMANDS}"],
        env={key: value for key, value in environment.items() if value is not None},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=280,
    )
    shutil.rmtree("/tmp/s3-megatron-noexec", ignore_errors=True)
    demonstrated = (folder / "demo.log").read_text(errors="replace")
    output = done.stdout.decode(errors="replace") + (folder / "step.log").read_text(errors="replace") + demonstrated
    assert "Traceback" not in output, output[-3000:]
    assert (folder / "runs/first/FINISHED").exists(), output[-3000:]
    assert done.returncode == machine.runs_code, output[-3000:]
    for text in machine.says:
        assert text in output, output[-3000:]
    ended_in_order(folder / "runs" / ENGINES[machine.engine].results / "s3", output)


def ended_in_order(run: Path, output: str) -> None:
    """Of a demonstration that was ended nothing runs on, and all that it has written is whole."""
    assert "the demonstration: 143" in output and "\nstopped; every rank has ended\n" in output, output[-3000:]
    folder = run.parents[2]
    assert not [process for process in psutil.process_iter() if stands_in(process, folder)]
    assert not [path for path in folder.rglob("*") if path.suffix in (".tmp", ".partial", ".part")]
    first, *_ = [event for event in read(run / "watch/metrics.jsonl") if event["event"] == "train"]
    assert first["iteration"] == 1 and 7 < first["lm_loss"] < 9
    assert "S3 ignores" not in (run / "logs/job.log").read_text(), "the hosts' notes in param groups are no settings"
    saved = newest(run / "checkpoints")
    assert saved.iteration is not None and not saved.torn, "SIGTERM has Megatron save, and DeepSpeed's entry"
    corpus = run.parents[1] / "corpus" / platform.python_version()
    assert all(read(corpus / f"{split}.jsonl") for split in ("train", "validation"))
    assert inspect(corpus / "train").tokens > 10**6


def read(lines: Path) -> list[dict[str, Any]]:
    """Every line of a file, each a whole JSON value."""
    return [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]


def stands_in(process: psutil.Process, folder: Path) -> bool:
    """Whether a process that has not ended has its working folder there."""
    try:
        return lives(process) and Path(process.cwd()).is_relative_to(folder)
    except psutil.Error:
        return False


def compiler(folder: Path) -> Path:
    """A compiler that hands out the installed library: the real one takes 40 CPU seconds, fifteen times over."""
    from s3_megatron.kernels.cpu import library

    script = folder / "compiler"
    script.write_text(
        "#!/bin/bash\nout=${*: -1}\n"
        f'[[ " $* " == *" -shared "* ]] && exec cp {library.load()._name} "$out"\nexec touch "$out"\n'
    )
    script.chmod(0o755)
    return script
