#!/usr/bin/env bash
# Make or reuse the virtual environment .venv at the repository root and install longctx in it, with pinned versions.
#
#   bash tools/setup_env.sh [EXTRA...]        EXTRA: test, eval, dev, track (see pyproject.toml); none: the package alone
#
# A stamp per set of extras remembers what was installed, so a second call for these extras or fewer takes no time until
# pyproject.toml, tools/constraints.txt or this script change. Environment: PYTHON=python3 names the interpreter; pip's own variables
# (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, ...) choose where packages come from, and with that CPU or CUDA builds of torch.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv="$root/.venv"
constraints="$root/tools/constraints.txt"
python=${PYTHON:-python3}
extras=$(printf '%s\n' "$@" | sort -u | paste -sd, -)

fail() {
    echo "error: $*" >&2
    exit 2
}

check_machine() {
    command -v "$python" >/dev/null || fail "$python was not found; install Python 3.11 or newer, or name it with PYTHON=..."
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "$("$python" --version) is too old; longctx needs Python 3.11 or newer (name another one with PYTHON=...)"
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        fail "$python has no venv module; install it (on Debian and Ubuntu: apt install python3-venv)"
    for compiler in "${CXX:-c++}" g++ clang++; do
        command -v "$compiler" >/dev/null && return
    done
    fail "no C++ compiler was found; install one (on Debian and Ubuntu: apt install build-essential)"
}

fingerprint() {
    { cat "$root/pyproject.toml" "$constraints" "${BASH_SOURCE[0]}" && "$venv/bin/python" -VV; } |
        sha256sum | cut -d' ' -f1
}

# Whether an earlier call installed all that is asked for.
is_installed() {
    local now stamp extra
    now=$(fingerprint)
    for stamp in "$venv"/longctx-installed-*; do
        [ "$(cat "$stamp" 2>/dev/null)" = "$now" ] || continue
        for extra in ${extras//,/ }; do
            [[ ",${stamp##*/longctx-installed-}," = *",$extra,"* ]] || continue 2
        done
        return 0
    done
    return 1
}

# Console scripts hold absolute paths, so an environment is useless once the repository has moved.
venv_is_usable() {
    [ "$(cat "$venv/longctx-root" 2>/dev/null)" = "$root" ] && "$venv/bin/python" -m pip --version >/dev/null 2>&1
}

pip_install() {
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint "$constraints" "$@" ||
        fail "pip could not install $what; its message is above"
}

check_machine
exec 9>"$root/.venv.lock"
if command -v flock >/dev/null; then flock 9; fi # two scripts at once must not install over each other

if ! venv_is_usable; then
    echo "setup: making $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv" || fail "$python -m venv could not make $venv; its message is above"
    echo "$root" >"$venv/longctx-root"
fi

if is_installed; then exit 0; fi

echo "setup: installing torch (step 1 of 3)"
what="torch and the build tools"
pip_install setuptools wheel ninja packaging torch
echo "setup: installing deepspeed, without compiling its operators (step 2 of 3)"
what="deepspeed"
# deepspeed is a source package whose setup imports torch and others, hence no build isolation.
pip_install py-cpuinfo numpy psutil pydantic tqdm hjson msgpack einops
DS_BUILD_OPS=0 pip_install --no-build-isolation deepspeed
echo "setup: installing longctx${extras:+ with $extras} (step 3 of 3)"
what="longctx"
pip_install --no-build-isolation --editable "$root${extras:+[$extras]}"
fingerprint >"$venv/longctx-installed-${extras:-base}"
