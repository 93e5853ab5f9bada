#!/bin/sh
# Install the distribution packages that tests and bench use as independent peers.
# usage: setup_system.sh PACKAGE|PACKAGE:FILE...
# PACKAGE:FILE takes one program out of a package that would bring many others with it, into /usr/local/bin.
# Not root, or no apt: names what is missing and succeeds; the tests that need it skip by name.
set -eu
missing=
single=
for wanted in "$@"; do
    case $wanted in
    *:*) command -v "$(basename "${wanted#*:}")" >/dev/null || single="$single $wanted" ;;
    *) dpkg-query -W -f '${Status}' "$wanted" 2>/dev/null | grep -q 'install ok installed' || missing="$missing $wanted" ;;
    esac
done
[ -n "$missing$single" ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "not installed (tests that need them are skipped by name):$missing$single" >&2
    [ -z "$missing" ] || echo "  to install: sudo apt-get install$missing" >&2
    exit 0
fi
echo "installing:$missing$single"
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
if [ -n "$missing" ]; then
    # shellcheck disable=SC2086
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null || status=$?
fi
[ -z "$made" ] || rm -f "$policy"
for one in $single; do
    place=$(mktemp -d)
    chmod 755 "$place"
    (
        cd "$place"
        apt-get download -qq -o APT::Sandbox::User=root "${one%%:*}" >/dev/null
        dpkg-deb --extract ./*.deb .
        install -m 755 "./${one#*:}" /usr/local/bin/
    ) || status=$?
    rm -rf "$place"
done
exit $status
