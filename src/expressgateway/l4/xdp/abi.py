"""libbpf's functions and structures as its headers and the kernel's have them: libbpf.h, bpf.h, btf.h.

Only what `libbpf` calls, and of structures only as much as we read or write: both the library and the kernel
take shorter ones, and what is not named is zero.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections import deque
from ctypes import POINTER, byref, c_char, c_char_p, c_int, c_size_t, c_uint8, c_uint32, c_uint64, c_void_p
from functools import cache
from typing import Any, Final

_LOG_LINES: Final = 24
"""How much of what libbpf said, at the end of it, goes with an error; the verifier's last words among it."""

_Print = ctypes.CFUNCTYPE(c_int, c_int, c_char_p, c_void_p)  # level, format, va_list: passed as a pointer


class BpfError(OSError):
    """What was asked of the kernel or of libbpf, and the answer: `errno` and `strerror`."""

    def __init__(self, errno: int, asked: str, said: tuple[str, ...] = ()) -> None:
        super().__init__(errno, _strerror(errno))
        self.asked = asked
        """What we wanted, as the rest of a sentence that begins with "cannot"."""
        self.said = said
        """The last lines of libbpf's warnings, and of the verifier's log in them."""

    def __str__(self) -> str:
        return "\n  ".join((f"cannot {self.asked}: {self.strerror}", *self.said))


class _Heard(threading.local):
    """What libbpf has warned of, to the thread that asked; it speaks before it returns."""

    def __init__(self) -> None:
        self.lines: deque[str] = deque(maxlen=_LOG_LINES)


heard = _Heard()


_INTEGER, _TEXT, _POINTER, _COUNT = c_int, c_char_p, c_void_p, POINTER(c_uint32)

_SIGNATURES: Final[dict[str, tuple[Any, ...]]] = {
    # name: (result, *arguments)
    "libbpf_version_string": (_TEXT,),
    "libbpf_num_possible_cpus": (_INTEGER,),
    "libbpf_set_print": (_POINTER, _Print),
    "libbpf_strerror": (_INTEGER, _INTEGER, _TEXT, c_size_t),
    "bpf_map_create": (_INTEGER, _INTEGER, _TEXT, c_uint32, c_uint32, c_uint32, _POINTER),
    "bpf_map_lookup_elem": (_INTEGER, _INTEGER, _TEXT, _POINTER),
    "bpf_map_update_elem": (_INTEGER, _INTEGER, _TEXT, _TEXT, c_uint64),
    "bpf_map_delete_elem": (_INTEGER, _INTEGER, _TEXT),
    "bpf_map_get_next_key": (_INTEGER, _INTEGER, _TEXT, _POINTER),
    "bpf_map_update_batch": (_INTEGER, _INTEGER, _TEXT, _TEXT, _COUNT, _POINTER),
    "bpf_map_lookup_batch": (
        _INTEGER, _INTEGER, _POINTER, _POINTER, _POINTER, _POINTER, _COUNT, _POINTER,
    ),
    "bpf_obj_pin": (_INTEGER, _INTEGER, _TEXT),
    "bpf_obj_get": (_INTEGER, _TEXT),
    "bpf_obj_get_info_by_fd": (_INTEGER, _INTEGER, _POINTER, _COUNT),
    "bpf_prog_get_next_id": (_INTEGER, c_uint32, _COUNT),
    "bpf_prog_get_fd_by_id": (_INTEGER, c_uint32),
    "bpf_prog_test_run_opts": (_INTEGER, _INTEGER, _POINTER),
    "bpf_link_create": (_INTEGER, _INTEGER, _INTEGER, _INTEGER, _POINTER),
    "bpf_link_update": (_INTEGER, _INTEGER, _INTEGER, _POINTER),
    "bpf_link_detach": (_INTEGER, _INTEGER),
    "bpf_xdp_query": (_INTEGER, _INTEGER, _INTEGER, _POINTER),
    "bpf_object__open_file": (_POINTER, _TEXT, _POINTER),
    "bpf_object__load": (_INTEGER, _POINTER),
    "bpf_object__close": (None, _POINTER),
    "bpf_object__btf": (_POINTER, _POINTER),
    "bpf_object__find_map_by_name": (_POINTER, _POINTER, _TEXT),
    "bpf_object__next_map": (_POINTER, _POINTER, _POINTER),
    "bpf_object__next_program": (_POINTER, _POINTER, _POINTER),
    "bpf_map__set_max_entries": (_INTEGER, _POINTER, c_uint32),
    "bpf_map__reuse_fd": (_INTEGER, _POINTER, _INTEGER),
    "bpf_map__fd": (_INTEGER, _POINTER),
    "bpf_map__name": (_TEXT, _POINTER),
    "bpf_map__key_size": (c_uint32, _POINTER),
    "bpf_map__value_size": (c_uint32, _POINTER),
    "bpf_map__max_entries": (c_uint32, _POINTER),
    "bpf_program__fd": (_INTEGER, _POINTER),
    "bpf_program__name": (_TEXT, _POINTER),
    "bpf_program__insns": (_POINTER, _POINTER),
    "bpf_program__insn_cnt": (c_size_t, _POINTER),
    "btf__type_cnt": (c_uint32, _POINTER),
    "btf__type_by_id": (_POINTER, _POINTER, c_uint32),
    "btf__name_by_offset": (_TEXT, _POINTER, c_uint32),
}  # fmt: skip


@cache
def library() -> ctypes.CDLL:
    """Opened once. OSError: there is none. AttributeError: one that is too old."""
    lib = ctypes.CDLL("libbpf.so.1", use_errno=True)
    for name, (result, *arguments) in _SIGNATURES.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    lib.libbpf_set_print(_listen)
    return lib


def _make_listener() -> ctypes._CFunctionType:
    libc = ctypes.CDLL(None)
    libc.vasprintf.argtypes = [POINTER(c_void_p), c_char_p, c_void_p]
    libc.free.argtypes = [c_void_p]

    def hear(level: int, form: bytes, arguments: int) -> int:
        text = c_void_p()
        if level == 0 and libc.vasprintf(byref(text), form, arguments) >= 0:  # 0: warnings
            lines = ctypes.string_at(text.value or 0).decode(errors="replace").splitlines()
            heard.lines.extend(line for line in lines if line)
            libc.free(text)
        return 0

    return _Print(hear)


_listen = _make_listener()
"""Kept: libbpf has only a pointer to it."""


def checked(result: int, asked: str, said: tuple[str, ...] = ()) -> int:
    """From 1.0 on a failure is -errno, and what succeeds is not negative."""
    if result < 0:
        raise BpfError(-result, asked, said)
    return result


def _strerror(errno: int) -> str:
    if errno < 4000:  # libbpf's own begin here
        return os.strerror(errno)
    text = ctypes.create_string_buffer(128)
    library().libbpf_strerror(errno, text, len(text))
    return text.value.decode()


# -- Structures


class MapCreate(ctypes.Structure):
    _fields_ = (
        ("sz", c_size_t),
        ("btf_fd", c_uint32),
        ("btf_key_type_id", c_uint32),
        ("btf_value_type_id", c_uint32),
        ("btf_vmlinux_value_type_id", c_uint32),
        ("inner_map_fd", c_uint32),
        ("map_flags", c_uint32),
    )


class LinkCreate(ctypes.Structure):
    _fields_ = (("sz", c_size_t), ("flags", c_uint32), ("zero", c_uint32))


class XdpQuery(ctypes.Structure):
    _fields_ = (
        ("sz", c_size_t),
        ("prog_id", c_uint32),
        ("drv_prog_id", c_uint32),
        ("hw_prog_id", c_uint32),
        ("skb_prog_id", c_uint32),
        ("attach_mode", c_uint8),
    )


class XdpContext(ctypes.Structure):
    _fields_ = (
        ("data", c_uint32),
        ("data_end", c_uint32),
        ("data_meta", c_uint32),
        ("ingress_ifindex", c_uint32),
        ("rx_queue_index", c_uint32),
        ("egress_ifindex", c_uint32),
    )


class TestRunOptions(ctypes.Structure):
    _fields_ = (
        ("sz", c_size_t),
        ("data_in", c_char_p),
        ("data_out", c_void_p),
        ("data_size_in", c_uint32),
        ("data_size_out", c_uint32),
        ("ctx_in", c_void_p),
        ("ctx_out", c_void_p),
        ("ctx_size_in", c_uint32),
        ("ctx_size_out", c_uint32),
        ("retval", c_uint32),
        ("repeat", c_int),
        ("duration", c_uint32),
        ("flags", c_uint32),
        ("cpu", c_uint32),
        ("batch_size", c_uint32),
    )


class MapInfo(ctypes.Structure):
    _fields_ = (
        ("type", c_uint32),
        ("id", c_uint32),
        ("key_size", c_uint32),
        ("value_size", c_uint32),
        ("max_entries", c_uint32),
        ("map_flags", c_uint32),
        ("name", c_char * 16),
    )


class KernelProgramInfo(ctypes.Structure):
    _fields_ = (
        ("type", c_uint32),
        ("id", c_uint32),
        ("tag", c_uint8 * 8),
        ("jited_prog_len", c_uint32),
        ("xlated_prog_len", c_uint32),
        ("jited_prog_insns", c_uint64),
        ("xlated_prog_insns", c_uint64),
        ("load_time", c_uint64),
        ("created_by_uid", c_uint32),
        ("nr_map_ids", c_uint32),
        ("map_ids", c_uint64),
        ("name", c_char * 16),
    )


class LinkInfo(ctypes.Structure):
    _fields_ = (
        ("type", c_uint32),
        ("id", c_uint32),
        ("prog_id", c_uint32),
        ("padding", c_uint32),
        ("ifindex", c_uint32),
        ("rest", c_uint32 * 11),
    )


class BtfType(ctypes.Structure):
    _fields_ = (("name_off", c_uint32), ("info", c_uint32), ("size", c_uint32))


class BtfMember(ctypes.Structure):
    _fields_ = (("name_off", c_uint32), ("type", c_uint32), ("offset", c_uint32))


class BtfEnum(ctypes.Structure):
    _fields_ = (("name_off", c_uint32), ("val", ctypes.c_int32))
