#!/bin/sh
# Make the virtual environment and install the package in it.
# usage: setup_venv.sh PYTHON VENV WHAT      (WHAT as pip takes it: . or '.[dev]')
set -eu
python=$1
venv=$2
what=$3

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "ExpressGateway needs Python 3.11 or newer; $python is $("$python" --version 2>&1)." >&2
    exit 1
}
if [ ! -x "$venv/bin/python" ]; then
    # Debian keeps venv's ensurepip in a package of its own.
    if ! "$python" -m venv "$venv" 2>/dev/null; then
        rm -rf "$venv"
        if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
            apt-get update -qq
            DEBIAN_FRONTEND=noninteractive apt-get install -y -qq python3-venv >/dev/null
            "$python" -m venv "$venv"
        else
            "$python" -m venv --without-pip "$venv"
        fi
    fi
fi
if [ -x "$venv/bin/pip" ]; then
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e "$what"
else
    # No ensurepip and not root: the system's pip can install into the environment from outside.
    "$python" -m pip --python "$venv/bin/python" install --quiet --disable-pip-version-check -e "$what"
fi
