# Sourced by demo.sh and test.sh, from the repository's root: an environment in .venv with this package and an extra.
#
#     prepare EXTRA MODULE...   installs '.[EXTRA]' unless every MODULE can be imported
#
# PYTHON chooses the interpreter that makes .venv.

say() { printf '%s\n' "$*"; }
fail() { printf '%s\n' "$*" >&2; exit 1; }

make_venv() {
    python=${PYTHON:-}
    if [ -z "$python" ]; then
        for candidate in python3 python; do
            if command -v "$candidate" >/dev/null 2>&1; then python=$candidate; break; fi
        done
    fi
    [ -n "$python" ] || fail "No Python found. Install Python 3.10 or later, or name one: PYTHON=/path/to/python3 sh $0"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
        fail "$python is not Python 3.10 or later ($("$python" --version 2>&1)). Name another: PYTHON=python3.12 sh $0"
    if ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
        minor=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        if command -v apt-get >/dev/null 2>&1; then fix="sudo apt install python$minor-venv"
        elif command -v dnf >/dev/null 2>&1; then fix="sudo dnf install python3-pip"
        elif command -v zypper >/dev/null 2>&1; then fix="sudo zypper install python3-pip"
        else fix="install Python's venv and ensurepip modules with your system's package manager"; fi
        fail "$python -m venv is missing. This brings it:

    $fix

Then run this again."
    fi
    say "Making an environment in .venv ..."
    "$python" -m venv .venv || { rm -rf .venv; fail "$python -m venv .venv failed; its message stands above."; }
}

prepare() {
    extra=$1
    shift
    # An interrupted run may have left a folder without a working pip.
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then rm -rf .venv; make_venv; fi
    imports=$(printf 'import %s; ' "$@")
    if ! .venv/bin/python -c "$imports" >/dev/null 2>&1; then
        say "Installing visionmix and what it needs into .venv (PyTorch is large: this takes some minutes) ..."
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".[$extra]" ||
            fail "The installation failed; pip's message stands above. Run this again once that is mended."
    fi
}
