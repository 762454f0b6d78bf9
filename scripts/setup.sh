#!/usr/bin/env bash
# Make .venv hold requirements/cpu.lock and this project, with the argument `test` also requirements/test.lock; at once if
# it already does. PYTHON=... chooses the Python.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=.venv log=.venv/setup.log lock=requirements/cpu.lock

# by content, so that a checkout or a touch installs nothing; with the folder, because a venv cannot be moved
key() { echo "$PWD $(cat "$@" scripts/setup.sh | cksum)"; }

done_before() { [ "$(cat "$venv/$1.done" 2>/dev/null)" = "$(key "${@:2}")" ]; }  # done_before NAME FILE...

say() { echo "setup: $*" >&2; }

step() {  # step WHAT COMMAND...: one line on the screen, everything else in the log
    local start=$SECONDS
    say "$1 ..."
    shift
    if ! "$@" >>"$log" 2>&1 </dev/null; then
        say "failed after $((SECONDS - start)) s; the end of $log:"
        tail -n 15 "$log" | cut -c1-300 >&2
        exit 1
    fi
}

usable() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11 python}; do
        if usable "$candidate"; then echo "$candidate"; return; fi
    done
    say "no Python >= 3.11 found (tried ${PYTHON:-python3, python3.11 to python3.14, python}); install one, or name it: make setup PYTHON=/path/to/python"
    exit 1
}

make_venv() {
    # Debian's python3 has no ensurepip unless python3-venv is installed: then its own pip brings one
    "$1" -m venv "$venv" || { "$1" -m venv --without-pip "$venv" && "$1" -m pip --python "$venv/bin/python" install pip; }
}

install_lock() {  # install_lock FILE
    step "installing $(grep -c == "$1") packages of $1, a few minutes the first time (log: $log)" \
        $pip install --progress-bar off --no-deps -r "$1"
}

pip="$venv/bin/python -m pip --disable-pip-version-check --no-input"
mkdir -p "$venv"
if ! done_before setup "$lock" pyproject.toml; then
    rm -f "$venv"/*.done
    : >"$log"
    if ! usable "$venv/bin/python" || ! $pip --version >/dev/null 2>&1; then
        python=$(find_python)
        step "making $venv with $("$python" --version)" make_venv "$python"
    fi
    install_lock "$lock"
    if ! "$venv/bin/python" -c 'import torch' >>"$log" 2>&1; then
        step "this torch is a CUDA build and lacks its libraries; installing them" \
            $pip install --progress-bar off "$(grep '^torch==' "$lock")"
    fi
    # compat: a plain path entry, which also finds packages that are added later
    step "installing this project" $pip install --no-deps --no-build-isolation --config-settings editable_mode=compat --editable .
    key "$lock" pyproject.toml >"$venv/setup.done"
    say "done in $SECONDS s"
fi

if [ "${1:-}" = test ] && ! done_before test requirements/test.lock; then
    install_lock requirements/test.lock
    key requirements/test.lock >"$venv/test.done"
fi
