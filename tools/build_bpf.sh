#!/bin/sh
# Compile the XDP program. The same compiler makes the same bytes of the same source, wherever that is.
# usage: build_bpf.sh [OUTPUT]
# Without OUTPUT it is the object that ships, with the compiler's name beside it.
set -eu
cd "$(dirname "$0")/../src/expressgateway/l4/xdp/bpf"
output=${1:-$PWD/balancer.bpf.o}
# Debian has the headers of the kernel's types below the machine's name, where clang does not look for this target.
set -- /usr/include/*-linux-gnu
clang -O2 -g -target bpf -mcpu=v3 -Wall -Wextra -Werror -Wno-unused-parameter \
    -fdebug-compilation-dir=. -idirafter "$1" -c balancer.bpf.c -o "$output"
llvm-strip -g "$output" # of DWARF; the types (BTF) stay
if [ "$output" = "$PWD/balancer.bpf.o" ]; then
    clang --version | head -n 1 >compiler.txt
fi
