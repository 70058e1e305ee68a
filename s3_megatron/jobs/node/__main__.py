"""``python -m s3_megatron.jobs.node --run-dir RUN --attempt ID --start-minutes F --hang-minutes F -- COMMAND...``."""

import argparse
import signal
import sys
from pathlib import Path

from s3_megatron.errors import S3Error
from s3_megatron.jobs.node.agent import Agent


def main() -> int:
    """Run this node's part of an attempt; returns the exit code."""
    parser = argparse.ArgumentParser(prog="s3_megatron.jobs.node", allow_abbrev=False)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--attempt", required=True, help="the attempt's folder in RUN/attempts")
    parser.add_argument("--start-minutes", type=float, required=True, help="from the start to the first iteration")
    parser.add_argument("--hang-minutes", type=float, required=True, help="between two logged iterations")
    parser.add_argument("command", nargs="+", help="torchrun, after --")
    args = parser.parse_args()
    try:
        # Not resolve(): a cluster's automounter may give one path several names.
        agent = Agent(args.run_dir.absolute(), args.attempt, args.start_minutes, args.hang_minutes)
        return agent.main(args.command)
    except S3Error as error:
        print(f"s3_megatron: error: {error}", file=sys.stderr)
        return 1
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):  # the verdict is written: a late one changes nothing
            signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    sys.exit(main())
