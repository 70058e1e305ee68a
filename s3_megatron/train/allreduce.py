"""The old name of s3_megatron.jobs.node.allreduce, for scripts that are queued already; goes after 0.1."""

import runpy

if __name__ == "__main__":
    runpy.run_module("s3_megatron.jobs.node.allreduce", run_name="__main__", alter_sys=True)
