#!/usr/bin/env bash
# Sets up everything fastbarlow needs on Debian or Ubuntu: setup.sh VENV_FOLDER
#
# 1. Where they are missing, the Debian packages that FFCV is built with.
# 2. A virtual environment of Python 3.11 or 3.12 with the pinned packages of constraints.txt.
# 3. The DALI build that matches torch's CUDA.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1

fail() {
    echo "setup: $1" >&2
    exit 1
}

supported() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null
}

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3 python3.12 python3.11; do
        if [ -n "$candidate" ] && supported "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

# 1. What FFCV is built with. The interpreter's own headers and venv module come with a Python that is not Debian's.
python=$(find_python) || fail "Python 3.11 or 3.12 is needed; install one, or name it: make PYTHON=/path/to/python3.12 …"
can_build() {
    command -v g++ && pkg-config --exists opencv4 libturbojpeg &&
        "$python" -c 'import ensurepip, sysconfig, pathlib
assert pathlib.Path(sysconfig.get_path("include"), "Python.h").exists()'
} &>/dev/null
if ! can_build; then
    packages=(g++ pkg-config libopencv-dev libturbojpeg0-dev)
    if [[ $(readlink -f "$(command -v "$python")") == /usr/bin/* ]]; then
        version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        packages+=("python$version-venv" "python$version-dev")
    fi
    command -v apt-get >/dev/null ||
        fail "apt-get was not found; install these yourself (names as in Debian): ${packages[*]}"
    sudo=()
    if [ "$(id -u)" -ne 0 ]; then
        command -v sudo >/dev/null || fail "not root and no sudo; ask an administrator to install: ${packages[*]}"
        sudo=(sudo)
    fi
    echo "setup: installing Debian packages: ${packages[*]}"
    "${sudo[@]}" apt-get update -qq
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
fi

# 2. The virtual environment.
echo "setup: installing Python packages into $venv (about 6 GB; some minutes)"
[ -x "$venv/bin/python" ] && supported "$venv/bin/python" || "$python" -m venv --clear "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check install --quiet --constraint constraints.txt)
"${pip[@]}" --editable '.[dev]'

# 3. DALI. Its builds differ by CUDA's major version.
cuda=$("$venv/bin/python" -c 'import torch; print((torch.version.cuda or "none").split(".")[0])')
case $cuda in
    12 | 13) "${pip[@]}" --editable ".[dali-cuda$cuda]" ;;
    *) fail "torch was installed without CUDA 12 or 13 (torch.version.cuda: $cuda), and DALI has no build for that" ;;
esac
echo "setup: done"
