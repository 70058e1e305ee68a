#!/bin/sh
# Prints the path of a Python that can carry this project, or says in one line how to get one.
#
#   launch/find-python.sh            looks for one
#   PYTHON=/path/to/python launch/find-python.sh   checks that one and no other
#
# 3.12 and 3.13 are the versions megatron-core 0.19 has wheels for; a newer one would have to compile
# it. 3.12 comes first: it is what NVIDIA's containers carry and what every figure was measured with.
# A candidate counts only when it has been run: pyenv leaves shims on the PATH that exist and fail.
set -eu

how="get one with 'uv python install 3.12', 'pyenv install 3.12' or the system's packages python3.12, \
python3.12-venv and python3.12-dev, or name yours: make PYTHON=/path/to/python3.12"

# Prints the interpreter behind $1 (a virtual environment's own would vanish with it) or why it will
# not do. Python.h: Megatron compiles its dataset helper against it.
probe() {
    "$1" -I -c '
import os, sys, sysconfig
def refuse(reason):
    print("it is %d.%d.%d %s" % (sys.version_info[:3] + (reason,)))
    sys.exit(1)
if not (3, 12) <= sys.version_info[:2] <= (3, 13):
    refuse("and not 3.12 or 3.13")
if sys.platform == "darwin" and os.uname().machine == "x86_64":
    refuse("for Intel Macs, which torch has no wheel for")
try:
    import ensurepip, venv
except ImportError as error:
    refuse("without %s, so it cannot make a virtual environment" % error.name)
if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
    refuse("without Python.h, which Megatron compiles against")
print(getattr(sys, "_base_executable", sys.executable))
' 2>/dev/null </dev/null
}

if [ -n "${PYTHON:-}" ]; then
    if answer=$(probe "$PYTHON"); then
        echo "$answer"
        exit 0
    fi
    echo "PYTHON=$PYTHON will not do: ${answer:-it does not run}; $how" >&2
    exit 1
fi

pyenv_versions=${PYENV_ROOT:-${HOME:-/}/.pyenv}/versions
for candidate in python3.12 python3.13 python3 \
    "$pyenv_versions"/3.12.*/bin/python "$pyenv_versions"/3.13.*/bin/python; do
    if command -v "$candidate" >/dev/null 2>&1 && answer=$(probe "$candidate"); then
        echo "$answer"
        exit 0
    fi
done
for version in 3.12 3.13; do
    # Only uv's own: asked for any, it stops at the same failing shims.
    if candidate=$(uv python find --python-preference only-managed "$version" 2>/dev/null) && answer=$(probe "$candidate"); then
        echo "$answer"
        exit 0
    fi
done

echo "no Python 3.12 or 3.13 found; $how" >&2
exit 1
