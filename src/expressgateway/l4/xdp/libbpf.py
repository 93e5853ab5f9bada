"""libbpf, as far as the data plane needs it: objects, maps, programs, links and types.

The one door to the library, which is the distribution's (`libbpf.so.1`, 1.0 or later) and is opened when it
is first needed: importing this module needs nothing. Everything is thin. A call that fails raises `BpfError`
with the kernel's number; what an operator should do about it is for others to say.

Every object here owns one file descriptor, which is closed on exec and when the object is closed. What the
kernel holds lives on as long as anybody has a descriptor of it, or a file of the BPF file system (`pin`).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Iterator
from ctypes import byref, c_char_p, c_uint32, c_void_p
from pathlib import Path
from typing import Final, NamedTuple, Self

from expressgateway.l4.xdp.abi import (
    BpfError,
    BtfEnum,
    BtfMember,
    BtfType,
    KernelProgramInfo,
    LinkCreate,
    LinkInfo,
    MapCreate,
    MapInfo,
    TestRunOptions,
    XdpContext,
    XdpQuery,
    checked,
    heard,
    library,
)

__all__ = [
    "DRIVER_MODE",
    "HARDWARE_MODE",
    "INNER_MAP",
    "SKB_MODE",
    "BpfError",
    "Link",
    "Map",
    "MapShape",
    "Object",
    "Program",
    "ProgramInfo",
    "Struct",
    "TestRun",
    "Types",
    "attached",
    "available",
    "create_array",
    "possible_cpus",
    "program_info",
    "version",
]

SKB_MODE: Final = 1 << 1
"""XDP_FLAGS_SKB_MODE: in the stack, for any driver."""
DRIVER_MODE: Final = 1 << 2
"""XDP_FLAGS_DRV_MODE: in the driver."""
HARDWARE_MODE: Final = 1 << 3
"""XDP_FLAGS_HW_MODE: on the card."""

INNER_MAP: Final = 1 << 12
"""BPF_F_INNER_MAP: arrays of different sizes may take one another's place in an array of maps."""

# Part of the kernel's ABI: linux/bpf.h.
_ARRAY: Final = 2
_PER_CPU: Final = (5, 6, 10)  # hash, array, LRU hash
_ATTACH_XDP: Final = 37

_MIN_BATCH: Final = 16
_TEST_HEADROOM: Final = 512
"""How much longer a packet may come out of a test run than it went in."""


def available() -> str | None:
    """None, or a sentence: why there is no BPF here."""
    try:
        lib = library()
    except OSError:
        return "libbpf.so.1 is missing: install it (Debian, Ubuntu: libbpf1; Fedora: libbpf)"
    except AttributeError as error:
        return f"libbpf.so.1 is older than 1.0: {error}"
    following = c_uint32()
    if lib.bpf_prog_get_next_id(0, byref(following)) == -errno.ENOSYS:
        return "this kernel has no BPF (CONFIG_BPF_SYSCALL)"
    return None


def version() -> str:
    """libbpf's own word, like ``v1.1``."""
    text: bytes = library().libbpf_version_string()
    return text.decode()


def possible_cpus() -> int:
    """How many values each entry of a per-CPU map has."""
    return checked(library().libbpf_num_possible_cpus(), "count the CPUs")


class Map:
    """A map, by its descriptor. Keys and values are bytes, as long as the map's."""

    def __init__(self, fd: int, name: str | None = None) -> None:
        """Takes the descriptor. ``name``: the kernel's has 15 letters at most."""
        self.fd = fd
        info = MapInfo()
        _info(fd, info, "ask about a map")
        self.name = name or info.name.decode()
        self.id: int = info.id
        self.type: int = info.type
        self.key_size: int = info.key_size
        self.value_size: int = info.value_size
        self.max_entries: int = info.max_entries
        self._cpus = possible_cpus() if self.type in _PER_CPU else 1
        self._stride = (self.value_size + 7) & ~7 if self.type in _PER_CPU else self.value_size
        """From one CPU's value to the next one's: the kernel rounds them up."""

    def __repr__(self) -> str:
        return f"Map({self.name}, {self.max_entries} of {self.key_size} -> {self.value_size} bytes)"

    @staticmethod
    def pinned(path: str | os.PathLike[str]) -> Map:
        return Map(_pinned(path), Path(path).name)

    def get(self, key: bytes) -> bytes | None:
        """The value, or None. Of a map in this map: its number (`id`), as the kernel gives it."""
        return self._lookup(key)

    def get_percpu(self, key: bytes) -> list[bytes]:
        """Each possible CPU's value; empty where there is no such key."""
        values = self._lookup(key)
        if values is None:
            return []
        return [values[at : at + self.value_size] for at in range(0, self._cpus * self._stride, self._stride)]

    def set(self, key: bytes, value: bytes, flags: int = 0) -> None:
        """Of a per-CPU map ``value`` is every CPU's, one after the other. A map in a map: its descriptor."""
        self._fit(key, self.key_size)
        self._fit(value, self._stride * self._cpus)
        result = library().bpf_map_update_elem(self.fd, key, value, flags)
        checked(result, f"set an entry of {self.name}")

    def delete(self, key: bytes) -> bool:
        """Whether it was there."""
        self._fit(key, self.key_size)
        result = library().bpf_map_delete_elem(self.fd, key)
        return result != -errno.ENOENT and checked(result, f"delete an entry of {self.name}") == 0

    def set_batch(self, keys: bytes, values: bytes, count: int) -> None:
        """Many at once. Where it fails some may have been set."""
        self._fit(keys, self.key_size * count)
        self._fit(values, self._stride * self._cpus * count)
        done = c_uint32(count)
        result = library().bpf_map_update_batch(self.fd, keys, values, byref(done), None)
        checked(result, f"set {count} entries of {self.name}")

    def batches(self, size: int = 4096) -> Iterator[tuple[bytes, bytes, int]]:
        """All entries: keys, values and how many. Not one moment's: the map may change meanwhile.

        A hash gives whole buckets; it has more than ``size`` at once where one bucket has more.
        """
        lib, stride = library(), self._stride * self._cpus
        size = max(min(size, self.max_entries), _MIN_BATCH)
        keys, values = (ctypes.create_string_buffer(size * each) for each in (self.key_size, stride))
        before, after = (ctypes.create_string_buffer(max(self.key_size, 8)) for _ in range(2))
        begun = False
        while True:
            count = c_uint32(size)
            start = before if begun else None
            result = lib.bpf_map_lookup_batch(self.fd, start, after, keys, values, byref(count), None)
            if result == -errno.ENOSPC:
                size *= 2
                keys, values = (ctypes.create_string_buffer(size * each) for each in (self.key_size, stride))
                continue
            if result != -errno.ENOENT:  # the end, with the last ones
                checked(result, f"read entries of {self.name}")
            if count.value:
                got = count.value
                yield ctypes.string_at(keys, got * self.key_size), ctypes.string_at(values, got * stride), got
            if result:
                return
            before, after, begun = after, before, True

    def keys(self) -> Iterator[bytes]:
        """Every key, one call each. A key that goes meanwhile makes the kernel begin again."""
        lib, key, following = library(), None, ctypes.create_string_buffer(self.key_size)
        while True:
            result = lib.bpf_map_get_next_key(self.fd, key, following)
            if result == -errno.ENOENT:
                return
            checked(result, f"read keys of {self.name}")
            key = following.raw
            yield key

    def pin(self, path: str | os.PathLike[str]) -> None:
        _pin(self.fd, path)

    def close(self) -> None:
        self.fd = _close(self.fd)

    def _lookup(self, key: bytes) -> bytes | None:
        self._fit(key, self.key_size)
        value = ctypes.create_string_buffer(self._stride * self._cpus)
        result = library().bpf_map_lookup_elem(self.fd, key, value)
        if result == -errno.ENOENT:
            return None
        checked(result, f"read an entry of {self.name}")
        return value.raw

    def _fit(self, data: bytes, size: int) -> None:
        """The kernel reads as much as the map says, whatever we give."""
        if len(data) != size:
            raise ValueError(f"{self.name}: {len(data)} bytes where {size} belong")


def create_array(name: str, value_size: int, max_entries: int, flags: int = 0) -> Map:
    """A plain array. One that is to be put into an array of maps takes `INNER_MAP` as its flags."""
    options = MapCreate(sz=ctypes.sizeof(MapCreate), map_flags=flags)
    result = library().bpf_map_create(_ARRAY, name.encode(), 4, value_size, max_entries, byref(options))
    return Map(checked(result, f"make the map {name}"), name)


class TestRun(NamedTuple):
    """What a program did to a packet."""

    verdict: int
    data: bytes
    duration_ns: int
    """Of one run, on average."""


class Program:
    """A program that is loaded, by its descriptor."""

    def __init__(self, fd: int, name: str | None = None) -> None:
        """Takes the descriptor."""
        self.fd = fd
        info = KernelProgramInfo()
        _info(fd, info, "ask about a program")
        self.name = name or info.name.decode()
        self.id: int = info.id

    def __repr__(self) -> str:
        return f"Program({self.name}, {self.id})"

    def test_run(
        self, data: bytes, *, ifindex: int = 0, repeat: int = 1, ctx: bytes | None = None
    ) -> TestRun:
        """Give it a frame as if it had come in by ``ifindex``; `BPF_PROG_TEST_RUN`.

        ``ctx`` is a whole `struct xdp_md` in its place. The frame is not restored between repetitions.
        """
        if ctx is None:
            ctx = bytes(XdpContext(data_end=len(data), ingress_ifindex=ifindex))
        out = ctypes.create_string_buffer(len(data) + _TEST_HEADROOM)
        options = TestRunOptions(
            sz=ctypes.sizeof(TestRunOptions),
            data_in=data,
            data_size_in=len(data),
            data_out=ctypes.addressof(out),
            data_size_out=len(out),
            ctx_in=ctypes.cast(c_char_p(ctx), c_void_p),
            ctx_size_in=len(ctx),
            repeat=repeat,
        )
        result = library().bpf_prog_test_run_opts(self.fd, byref(options))
        checked(result, f"try the program {self.name}")
        return TestRun(options.retval, out.raw[: options.data_size_out], options.duration)

    def run(self, ctx: bytes) -> tuple[int, bytes]:
        """Run a program of the kind `syscall`: what it returned, and what became of its context."""
        held = ctypes.create_string_buffer(ctx, len(ctx))  # the kernel writes it back
        options = TestRunOptions(
            sz=ctypes.sizeof(TestRunOptions),
            ctx_in=ctypes.addressof(held),
            ctx_size_in=len(ctx),
        )
        checked(library().bpf_prog_test_run_opts(self.fd, byref(options)), f"run the program {self.name}")
        return ctypes.c_int32(options.retval).value, held.raw

    def close(self) -> None:
        self.fd = _close(self.fd)


class Link:
    """A program's place on an interface. It is given up with the last descriptor, unless it is pinned."""

    def __init__(self, fd: int) -> None:
        """Takes the descriptor."""
        self.fd = fd

    @classmethod
    def create(cls, program: Program, ifindex: int, flags: int) -> Self:
        """``flags``: a mode, or 0 for what the kernel prefers."""
        options = LinkCreate(sz=ctypes.sizeof(LinkCreate), flags=flags)
        result = library().bpf_link_create(program.fd, ifindex, _ATTACH_XDP, byref(options))
        return cls(checked(result, f"attach {program.name} to interface {ifindex}"))

    @classmethod
    def pinned(cls, path: str | os.PathLike[str]) -> Self:
        return cls(_pinned(path))

    def update(self, program: Program) -> None:
        """Another program in the same place; no packet meets none."""
        checked(library().bpf_link_update(self.fd, program.fd, None), f"put {program.name} into a link")

    def info(self) -> tuple[int, int]:
        """The interface and the program's `id`. The interface is 0 where it has gone."""
        info = LinkInfo()
        _info(self.fd, info, "ask about a link")
        return info.ifindex, info.prog_id

    def pin(self, path: str | os.PathLike[str]) -> None:
        _pin(self.fd, path)

    def detach(self) -> None:
        """Give the place up at once, whoever else holds the link."""
        checked(library().bpf_link_detach(self.fd), "detach a link")

    def close(self) -> None:
        self.fd = _close(self.fd)


class MapShape(NamedTuple):
    """Of a map that has not been made yet."""

    key_size: int
    value_size: int
    max_entries: int


class Struct(NamedTuple):
    """A struct as its compiler laid it out, in bytes."""

    size: int
    offsets: dict[str, int]


class Types(NamedTuple):
    """What an object says about the types that it was compiled with (BTF), by their names."""

    structs: dict[str, Struct]
    enums: dict[str, dict[str, int]]


class Object:
    """An object file: `open`, then `resize` and `reuse`, then `load`; then `maps` and `programs` are there.

    These own descriptors of their own and outlive the object, which need not be kept.
    """

    def __init__(self, pointer: int, path: Path) -> None:
        self._pointer = pointer
        self.path = path
        self.maps: dict[str, Map] = {}
        self.programs: dict[str, Program] = {}

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Read and parse it. Nothing has reached the kernel."""
        heard.lines.clear()
        pointer = library().bpf_object__open_file(os.fsencode(path), None)
        if not pointer:
            raise BpfError(ctypes.get_errno(), f"read the object {os.fspath(path)}", tuple(heard.lines))
        return cls(pointer, Path(path))

    def resize(self, name: str, max_entries: int) -> None:
        result = library().bpf_map__set_max_entries(self._map(name), max_entries)
        checked(result, f"give the map {name} {max_entries} entries")

    def reuse(self, name: str, existing: Map) -> None:
        """Have the programs use that map in the place of a new one."""
        checked(library().bpf_map__reuse_fd(self._map(name), existing.fd), f"use the map {existing.name}")

    def load(self) -> None:
        lib = library()
        heard.lines.clear()
        checked(lib.bpf_object__load(self._pointer), f"load the object {self.path}", tuple(heard.lines))
        each = lib.bpf_object__next_map(self._pointer, None)
        while each:
            name = lib.bpf_map__name(each).decode()
            self.maps[name] = Map(os.dup(lib.bpf_map__fd(each)), name)
            each = lib.bpf_object__next_map(self._pointer, each)
        each = lib.bpf_object__next_program(self._pointer, None)
        while each:
            name = lib.bpf_program__name(each).decode()
            self.programs[name] = Program(os.dup(lib.bpf_program__fd(each)), name)
            each = lib.bpf_object__next_program(self._pointer, each)

    def types(self) -> Types:
        """From the file, not from the kernel: before `load` as well."""
        lib, found = library(), Types({}, {})
        btf = lib.bpf_object__btf(self._pointer)
        for number in range(1, lib.btf__type_cnt(btf) if btf else 0):
            _add_type(btf, number, found)
        return found

    def map_shapes(self) -> dict[str, MapShape]:
        """As the file has them before `load`."""
        lib, found = library(), {}
        each = lib.bpf_object__next_map(self._pointer, None)
        while each:
            found[lib.bpf_map__name(each).decode()] = MapShape(
                lib.bpf_map__key_size(each), lib.bpf_map__value_size(each), lib.bpf_map__max_entries(each)
            )
            each = lib.bpf_object__next_map(self._pointer, each)
        return found

    def instructions(self) -> dict[str, bytes]:
        """Each program's, as the file has them before `load`."""
        lib, found = library(), {}
        each = lib.bpf_object__next_program(self._pointer, None)
        while each:
            count: int = lib.bpf_program__insn_cnt(each)
            name = lib.bpf_program__name(each).decode()
            found[name] = ctypes.string_at(lib.bpf_program__insns(each), 8 * count)
            each = lib.bpf_object__next_program(self._pointer, each)
        return found

    def close(self) -> None:
        """Free what libbpf holds; `maps` and `programs` are their owners' to close."""
        if self._pointer:
            library().bpf_object__close(self._pointer)
            self._pointer = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _map(self, name: str) -> int:
        pointer: int | None = library().bpf_object__find_map_by_name(self._pointer, name.encode())
        if not pointer:
            raise BpfError(errno.ENOENT, f"find the map {name} in {self.path}")
        return pointer


def attached(ifindex: int) -> dict[str, int]:
    """The programs on an interface of this network namespace: their numbers by mode (native, skb, hw)."""
    query = XdpQuery(sz=ctypes.sizeof(XdpQuery))
    checked(library().bpf_xdp_query(ifindex, 0, byref(query)), f"ask what is attached to interface {ifindex}")
    modes = {"native": query.drv_prog_id, "skb": query.skb_prog_id, "hw": query.hw_prog_id}
    return {mode: number for mode, number in modes.items() if number}


class ProgramInfo(NamedTuple):
    id: int
    name: str
    """Its first 15 letters."""
    tag: str
    """The kernel's digest of its instructions."""


def program_info(number: int) -> ProgramInfo:
    """About any program in the kernel."""
    fd = checked(library().bpf_prog_get_fd_by_id(number), f"find the program {number}")
    info = KernelProgramInfo()
    try:
        _info(fd, info, f"ask about the program {number}")
    finally:
        os.close(fd)
    return ProgramInfo(info.id, info.name.decode(), bytes(info.tag).hex())


def _info(fd: int, into: ctypes.Structure, asked: str) -> None:
    size = c_uint32(ctypes.sizeof(into))
    checked(library().bpf_obj_get_info_by_fd(fd, byref(into), byref(size)), asked)


def _pin(fd: int, path: str | os.PathLike[str]) -> None:
    checked(library().bpf_obj_pin(fd, os.fsencode(path)), f"pin as {os.fspath(path)}")


def _pinned(path: str | os.PathLike[str]) -> int:
    return checked(library().bpf_obj_get(os.fsencode(path)), f"open {os.fspath(path)}")


def _close(fd: int) -> int:
    """Idempotent: gives the descriptor that is nobody's."""
    if fd >= 0:
        with contextlib.suppress(OSError):
            os.close(fd)
    return -1


_KIND_STRUCT: Final = 4
_KIND_ENUM: Final = 6


def _add_type(btf: int, number: int, found: Types) -> None:
    """A type is a `struct btf_type` with its members behind it (linux/btf.h)."""
    lib = library()
    address: int = lib.btf__type_by_id(btf, number)
    kind = BtfType.from_address(address)
    count, which = kind.info & 0xFFFF, kind.info >> 24 & 0x1F
    if not kind.name_off or which not in (_KIND_STRUCT, _KIND_ENUM):
        return

    def name_at(offset: int) -> str:
        text: bytes = lib.btf__name_by_offset(btf, offset)
        return text.decode()

    address += ctypes.sizeof(BtfType)
    if which == _KIND_STRUCT:
        members = (BtfMember * count).from_address(address)
        offsets = {name_at(each.name_off): (each.offset & 0xFFFFFF) // 8 for each in members}
        found.structs[name_at(kind.name_off)] = Struct(kind.size, offsets)
    else:
        values = (BtfEnum * count).from_address(address)
        found.enums[name_at(kind.name_off)] = {name_at(each.name_off): each.val for each in values}
