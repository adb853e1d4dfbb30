#!/bin/sh
# Makes the virtual environment DIR and installs this checkout, editable, with its dev tools.
#   scripts/setup.sh DIR [name==version ...]
# Versions are those of constraints.txt; the further arguments replace its lines for those packages.
# Needs any Python >= 3.12 on the machine (PYTHON=... names one); installs with uv, else with pip.
set -eu
cd "$(dirname "$0")/.."
venv=$1
shift

# A candidate must run: version managers put shims on PATH that exist and fail.
works() {
    "$1" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
}

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        if works "$PYTHON"; then echo "$PYTHON"; fi
        return
    fi
    for candidate in \
        python3.12 "$HOME"/.pyenv/versions/3.12*/bin/python \
        "$(uv python find --no-project 3.12 2>/dev/null)" \
        python3.13 "$HOME"/.pyenv/versions/3.13*/bin/python python3 python \
        "$(uv python find --no-project '>=3.12' 2>/dev/null)" \
        python3.14 "$HOME"/.pyenv/versions/3.1[4-9]*/bin/python \
        "$HOME"/.local/share/uv/python/*/bin/python3 /usr/local/bin/python3 /opt/*/bin/python3
    do
        if [ -n "$candidate" ] && works "$candidate"; then
            echo "$candidate"
            return
        fi
    done
}

if ! works "$venv/bin/python"; then
    python=$(find_python)
    if [ -z "$python" ]; then
        if [ -n "${PYTHON:-}" ]; then
            echo "setup: PYTHON=$PYTHON is not a Python >= 3.12 with ensurepip and venv" >&2
        else
            echo "setup: no Python >= 3.12 was found (looked on PATH, in ~/.pyenv and in uv's);" \
                "install one, or name it: make PYTHON=/path/to/python3.12 setup" >&2
        fi
        exit 1
    fi
    echo "setup: making $venv with $("$python" -V) ($python)"
    "$python" -m venv "$venv"
fi

constraints=$venv/constraints.txt
cp constraints.txt "$constraints"
for pin in "$@"; do
    grep -v "^${pin%%==*}==" "$constraints" >"$constraints.new" || true
    echo "$pin" >>"$constraints.new"
    mv "$constraints.new" "$constraints"
done

echo "setup: installing effattn and its tools into $venv"
pip() {
    "$venv/bin/python" -m pip --disable-pip-version-check "$@"
}
# uv is ten times faster; pip is there where uv cannot be had or cannot reach the index.
if { [ -x "$venv/bin/uv" ] || pip install -q -c "$constraints" uv; } &&
    "$venv/bin/uv" pip install -q -p "$venv/bin/python" -c "$constraints" -e '.[dev]'; then
    :
else
    echo "setup: uv did not manage; installing with pip" >&2
    pip install -q -c "$constraints" -e '.[dev]'
fi
