"""Where the program is attached: one link for each interface, with a name of its own.

A link that was pinned by a process before this one is taken over with another program in it, so no packet
meets none. An interface may go and come back while we run: `watch` sees both.
"""

import errno
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from expressgateway.l4.xdp import bpffs
from expressgateway.l4.xdp.devices import Place, ifindex_of, places_of
from expressgateway.l4.xdp.faults import XdpError, no_interface, not_attached
from expressgateway.l4.xdp.libbpf import (
    DRIVER_MODE,
    HARDWARE_MODE,
    SKB_MODE,
    BpfError,
    Link,
    Program,
    attached,
)

log = logging.getLogger(__name__)

AUTO: Final = "auto"
_FLAGS: Final = {"native": DRIVER_MODE, "skb": SKB_MODE, "hw": HARDWARE_MODE}
_LINK: Final = "link-"


class Attachment:
    """One interface."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.ifindex = 0
        self.mode = ""
        """That it is attached in: native, skb or hw."""
        self.link: Link | None = None
        """None: it is not attached, see `fault`."""
        self.fault = ""
        """Why not, as a phrase."""

    @property
    def is_attached(self) -> bool:
        return self.link is not None


class Attachments:
    """All of them. To be used by one thread."""

    def __init__(self, pin_path: Path, program: Program) -> None:
        self._pin_path = pin_path
        self._program = program
        self.mode = AUTO
        self.each: dict[str, Attachment] = {}

    def attach(self, names: Sequence[str], mode: str) -> None:
        """Be attached to these and to no others. Raises `XdpError`; then those that were attached before are,
        and no others."""
        made: list[Attachment] = []
        kept: dict[str, Attachment] = {}
        before_mode, self.mode = self.mode, mode
        gone = {name for name, one in self.each.items() if not one.is_attached}
        changed = [name for name in names if name in self.each and mode not in (before_mode, AUTO)]
        for name in changed:
            if self.each[name].mode != mode:
                self._detach(self.each[name])
        try:
            for name in names:
                one = self.each.get(name)
                # One that is waited for is waited for (`watch`), and no reason to refuse another.
                if one is None or not (one.is_attached or name in gone):
                    one = Attachment(name)
                    self._attach(one)
                    made.append(one)
                kept[name] = one
        except XdpError:
            self.mode = before_mode
            for one in made:
                if one.name not in self.each:
                    self._detach(one)
            self._restore(changed)
            raise
        for name, one in self.each.items():
            if name not in kept:
                self._detach(one)
        for path in self._pinned():
            if bpffs.named(path.name.removeprefix(_LINK)) not in kept:
                _drop(path)
        self.each = kept

    def _restore(self, names: Sequence[str]) -> None:
        for name in names:
            one = self.each[name]
            if not one.is_attached:
                try:
                    self._attach(one)
                except XdpError as error:
                    one.fault = str(error)

    def _path(self, name: str) -> Path:
        return self._pin_path / f"{_LINK}{bpffs.file_name(name)}"

    def _pinned(self) -> list[Path]:
        return sorted(self._pin_path.glob(f"{_LINK}*"))

    def _attach(self, one: Attachment) -> None:
        ifindex = ifindex_of(one.name)
        if not ifindex:
            raise no_interface(one.name)
        if not places_of(one.name):
            raise XdpError(
                f"the interface {one.name} is no Ethernet: the program reads Ethernet's frames only"
            )
        path = self._path(one.name)
        link = self._adopted(path, ifindex)
        if link is None:
            link = self._created(one.name, ifindex)
            try:
                link.pin(path)
            except BpfError as error:
                link.detach()
                link.close()
                raise XdpError(f"the program's place on {one.name} cannot be kept: {error}") from None
        one.link, one.ifindex, one.fault = link, ifindex, ""
        one.mode = _mode(ifindex, self._program.id)
        log.info(
            "attached to %s in %s mode",
            one.name,
            one.mode,
            extra={"fields": {"interface": one.name, "mode": one.mode, "ifindex": ifindex}},
        )

    def _adopted(self, path: Path, ifindex: int) -> Link | None:
        """The link of a process before this one, with our program in it; None: there is none of any use."""
        if not path.exists():
            return None
        try:
            link = Link.pinned(path)
            where, program = link.info()
            if where == ifindex and self.mode in (AUTO, _mode(ifindex, program)):
                link.update(self._program)
                return link
            if where:
                link.detach()
            link.close()
        except BpfError as error:
            log.warning("what is pinned as %s is not taken over: %s", path, error)
        path.unlink(missing_ok=True)
        return None

    def _created(self, name: str, ifindex: int) -> Link:
        modes = ("native", "skb") if self.mode == AUTO else (self.mode,)
        for mode in modes:
            try:
                return Link.create(self._program, ifindex, _FLAGS[mode])
            except BpfError as error:
                is_last = mode == modes[-1]
                if is_last or error.errno in (errno.EBUSY, errno.EEXIST, errno.EPERM, errno.EACCES):
                    raise not_attached(error, name, ifindex, mode) from None
                log.info("%s is not attached to in %s mode: %s", name, mode, error.strerror)
        raise AssertionError("a mode is always tried")

    def _detach(self, one: Attachment) -> None:
        """Idempotent."""
        self._path(one.name).unlink(missing_ok=True)
        if one.link is None:
            return
        try:
            one.link.detach()
        except BpfError as error:
            if error.errno != errno.ENOLINK:  # it was gone before
                log.warning("%s", error)
        one.link.close()
        one.link = None

    def watch(self) -> bool:
        """Look whether interfaces have gone, or are back. True: something has changed."""
        is_changed = False
        for one in self.each.values():
            if one.link is not None:
                is_changed |= self._look_after(one, one.link)
            if one.link is None and ifindex_of(one.name):
                try:
                    self._attach(one)
                    is_changed = True
                except XdpError as error:
                    if one.fault != str(error):
                        one.fault = str(error)
                        log.error("%s", error)
        return is_changed

    def _look_after(self, one: Attachment, link: Link) -> bool:
        try:
            ifindex, program = link.info()
        except BpfError as error:
            log.warning("%s", error)
            return False
        if ifindex == one.ifindex == ifindex_of(one.name):
            if program != self._program.id:
                log.warning("somebody put another program into our place on %s: it is ours again", one.name)
                link.update(self._program)
            return False
        one.fault = (
            "the interface is gone" if not ifindex_of(one.name) else "it was detached by somebody else"
        )
        log.error(
            "not attached to %s any more: %s; its packets are served in user space",
            one.name,
            one.fault,
            extra={"fields": {"interface": one.name}},
        )
        self._detach(one)
        return True

    def places(self) -> list[Place]:
        """Where frames come in and leave now."""
        return [place for one in self.each.values() if one.is_attached for place in places_of(one.name)]

    def detach(self) -> None:
        """From everywhere, what a process before us left included. Idempotent."""
        for one in self.each.values():
            self._detach(one)
        for path in self._pinned():
            _drop(path)
        self.each = {}

    def close(self) -> None:
        """Give the descriptors up; the program stays where it is."""
        for one in self.each.values():
            if one.link is not None:
                one.link.close()
        self.each = {}


def _mode(ifindex: int, program: int) -> str:
    """That a program is attached in."""
    try:
        return next((mode for mode, number in attached(ifindex).items() if number == program), "")
    except BpfError:
        return ""


def _drop(path: Path) -> None:
    """A link that nobody wants any more."""
    try:
        link = Link.pinned(path)
    except BpfError as error:
        log.warning("%s", error)
    else:
        try:
            link.detach()
        except BpfError as error:
            if error.errno != errno.ENOLINK:
                log.warning("%s", error)
        link.close()
    path.unlink(missing_ok=True)


def detach_pinned(pin_path: Path) -> list[str]:
    """What is pinned below `pin_path` is taken from its interfaces, whose names are given, and forgotten."""
    names = []
    for path in sorted(pin_path.glob(f"{_LINK}*")):
        names.append(bpffs.named(path.name.removeprefix(_LINK)))
        _drop(path)
    bpffs.remove(pin_path)
    return names
