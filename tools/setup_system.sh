#!/bin/sh
# Install the distribution packages that tests and bench use as independent peers.
# usage: setup_system.sh PACKAGE...
# Not root, or no apt: names what is missing and succeeds; the tests that need it skip by name.
set -eu
missing=
for package in "$@"; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' || missing="$missing $package"
done
[ -n "$missing" ] || exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing:$missing"
    apt-get update -qq
    # The packages' own services are not wanted: tests start their own on ports of their own.
    policy=/usr/sbin/policy-rc.d
    made=
    if [ ! -e "$policy" ]; then
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod 755 "$policy"
        made=1
    fi
    status=0
    # shellcheck disable=SC2086
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null || status=$?
    [ -z "$made" ] || rm -f "$policy"
    exit $status
fi
echo "not installed (tests that need them are skipped by name):$missing" >&2
echo "  to install: sudo apt-get install$missing" >&2
