"""An upgrade: another supervisor takes over what this one has, and serves before this one stops.

    old supervisor                              new supervisor
      starts it, sends ``takeover``  ------->   binds what is missing; its workers start and are configured
      tells its workers who comes    <-------   ``ready``: their seats
      ``go``                         ------->   its workers serve, on the same sockets
      its workers stop reading them  <-------   ``serving``
      ``left``                       ------->   the admin listener answers
      drains, exits

Until ``serving`` the old one can go on as if nothing had been: the new one exits or does not answer, and is
ended. From then on the new one is the gateway, whatever becomes of the old one. Both ends speak as
supervisors and workers do: a `Channel`, and parcels beside it.

What passes: listening sockets with their numbers, the admin listener's, the shared tables, the way to every
worker's queue, session ticket keys, the secret of cookies, what operators and probes said of backends, and
the run-time changes since the file was read.
"""

import asyncio
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final, Self

from expressgateway.config.values import Address
from expressgateway.control import parcels
from expressgateway.control.census import CensusTable
from expressgateway.control.changes import AddBackend, Change, RemoveBackend, SetWeight
from expressgateway.control.channel import Channel, Message, pack_bytes, unpack_bytes
from expressgateway.control.deployment import Deployment, Heritage
from expressgateway.control.failures import StartError
from expressgateway.control.parcels import Parcel
from expressgateway.control.seats import Seats, seat_of
from expressgateway.control.socket_book import SocketBook
from expressgateway.control.sockets import Bound
from expressgateway.net.quic.spares import SpareTable

log = logging.getLogger(__name__)

VARIABLE: Final = "EXPRESSGATEWAY_PREDECESSOR"
"""Names the descriptors of the channel and of the parcels, in the environment of the new process."""

READY_S: Final = 60.0
"""For the new one to be ready, with all its workers."""
SERVING_S: Final = 30.0
GO_S: Final = 30.0

_OWN: Final = frozenset({"WATCHDOG_PID", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"})
"""What systemd said to this process alone. Signs of life are wanted of the new one as well."""

_CHANGES: Final = {"add": AddBackend, "remove": RemoveBackend, "weight": SetWeight}
_MEMBER: Final = "member"  # listener's number and index
_ADMIN: Final = "admin"
_CENSUS: Final = "census"
_SPARES: Final = "spares"


class UpgradeError(Exception):
    """The new supervisor does not take over; the old one goes on. `str()` is the sentence."""


def command() -> list[str]:
    """What this process was started with, on the interpreter that it runs on."""
    return [sys.executable, *sys.orig_argv[1:]]


# -- the old one


class Successor:
    """The new supervisor, as the old one sees it."""

    def __init__(self, process: "subprocess.Popen[bytes]", channel: Channel, sock: socket.socket) -> None:
        self._process = process
        self._channel = channel
        self._parcels = sock
        self.seats: dict[int, int] = {}
        """Its workers' slots by their seats, once it is ready."""
        self.xdp_pins: str | None = None
        """Where it has the XDP program's pins, once it is ready; None: it has none."""

    @property
    def pid(self) -> int:
        return self._process.pid

    @classmethod
    async def start(cls, argv: Sequence[str]) -> Self:
        """Raises `UpgradeError`."""
        ours, theirs = socket.socketpair()
        sender, receiver = parcels.pair()
        with theirs, receiver:
            environ = {name: value for name, value in os.environ.items() if name not in _OWN}
            environ[VARIABLE] = f"{theirs.fileno()},{receiver.fileno()}"
            try:
                process = subprocess.Popen(  # noqa: ASYNC220 - a moment, and asyncio's own would reap it
                    argv,
                    stdin=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(), receiver.fileno()),
                    env=environ,
                )
            except (OSError, subprocess.SubprocessError) as error:
                ours.close()
                sender.close()
                raise UpgradeError(f"{argv[0]} cannot be started: {error}") from None
        return cls(process, await Channel.open(ours), sender)

    async def give(
        self,
        deployment: Deployment,
        admin: socket.socket | None,
        changes: Sequence[Change],
        kept: Mapping[str, int],
    ) -> None:
        """Hand everything over, and wait until its workers are ready. ``kept``: what systemd has, as
        `Notifier.kept`. Raises `UpgradeError`."""
        bounds, seats = deployment.book.bounds, deployment.seats
        given: list[Parcel] = [
            (_CENSUS, seats.census.fd),
            (_SPARES, seats.spares.fd),
            *seats.writers(),
            *(
                (f"{_MEMBER} {bound.number} {index}", member.fileno())
                for bound in bounds
                for index, member in enumerate(bound.members)
            ),
        ]
        if admin is not None:
            given.append((_ADMIN, admin.fileno()))
        try:
            parcels.send(self._parcels, given)
        except parcels.ParcelError as error:
            raise UpgradeError(f"the new process {error.strerror}") from None
        self._channel.send(
            {
                "type": "takeover",
                "listeners": [_packed(bound) for bound in bounds],
                "seats": {str(seat): slot for seat, slot in deployment.fleet.places().items()},
                "tickets": {name: pack_bytes(data) for name, data in deployment.keys.dump().items()},
                "secret": pack_bytes(deployment.upstreams.secret),
                "states": deployment.upstreams.board.kept(),
                "changes": [_packed_change(change) for change in changes],
                "kept": dict(kept),
            }
        )
        message = await self._receive("ready", READY_S)
        self.seats = {int(seat): int(slot) for seat, slot in message["seats"].items()}
        self.xdp_pins = message.get("xdp_pins")
        for label, fd in parcels.receive(self._parcels):
            seat = seat_of(label)
            sock = socket.socket(fileno=fd)
            if seat in self.seats:
                seats.add_foreign(seat, sock)
            else:
                sock.close()

    async def go(self) -> None:
        """Let it serve, and wait until it does. Raises `UpgradeError`."""
        self._channel.send({"type": "go"})
        await self._receive("serving", SERVING_S)

    def left(self) -> None:
        """Our workers read the sockets no more."""
        self._channel.send({"type": "left"})
        self._channel.close()
        self._parcels.close()

    async def end(self) -> None:
        """It does not take over: it is ended, and its workers with it, which follow their channels."""
        self._channel.abort()
        self._parcels.close()
        self._process.kill()
        await asyncio.get_running_loop().run_in_executor(None, self._process.wait)

    async def _receive(self, kind: str, limit_s: float) -> Message:
        try:
            async with asyncio.timeout(limit_s):
                message = await self._channel.receive()
        except TimeoutError:
            raise UpgradeError(f"the new process is not {kind} within {limit_s:.0f} seconds") from None
        if message is None:
            try:
                status = self._process.wait(1.0)
            except subprocess.TimeoutExpired:
                raise UpgradeError("the new process has closed its channel") from None
            how = f"exited with status {status}" if status >= 0 else f"was killed by signal {-status}"
            raise UpgradeError(f"the new process {how} before it was {kind}; its own output says why")
        if message["type"] != kind:
            raise UpgradeError(f"the new process said {message['type']!r} where {kind!r} was due")
        return message


def _packed(bound: Bound) -> dict[str, Any]:
    wanted = bound.wanted or bound.address
    return {
        "number": bound.number,
        "name": bound.name,
        "kind": bound.kind,
        "is_datagram": bound.is_datagram,
        "address": [bound.address.host, bound.address.port],
        "wanted": [wanted.host, wanted.port],
        "is_spread": bound.is_spread,
        "lasting": bound.lasting,
        "members": len(bound.members),
    }


def _packed_change(change: Change) -> dict[str, Any]:
    kind = next(name for name, made in _CHANGES.items() if isinstance(change, made))
    return {"kind": kind, **asdict(change)}


# -- the new one


class Predecessor:
    """The supervisor that this one takes over from."""

    def __init__(self, channel: Channel, sock: socket.socket) -> None:
        self._channel = channel
        self._parcels = sock
        self.heritage = Heritage()
        self.admin: socket.socket | None = None
        """The admin listener's socket, listening; whoever takes it owns it."""
        self.changes: list[Change] = []
        """Run-time changes that were made to what the file says, in their order."""
        self.kept: dict[str, int] = {}
        """What it left with systemd; see `Notifier.kept`."""

    @classmethod
    async def find(cls, environ: Mapping[str, str]) -> Self | None:
        """The one that started this process, if it did so for an upgrade, with all it gave. Raises
        `StartError`."""
        given = environ.get(VARIABLE)
        if given is None:
            return None
        channel_fd, _, parcels_fd = given.partition(",")
        channel = await Channel.open(socket.socket(fileno=int(channel_fd)))
        sock = socket.socket(fileno=int(parcels_fd))
        os.set_inheritable(sock.fileno(), False)
        sock.setblocking(False)
        found = cls(channel, sock)
        try:
            async with asyncio.timeout(READY_S):
                message = await channel.receive()
        except TimeoutError:
            message = None
        if message is None or message["type"] != "takeover":
            raise StartError("the gateway that was to be taken over from is gone")
        found._take(message)
        return found

    def _take(self, message: Message) -> None:
        fds = dict(parcels.receive(self._parcels))
        bounds = [_unpacked(one, fds) for one in message["listeners"]]
        seats = Seats(CensusTable(fd=fds.pop(_CENSUS)), SpareTable(fd=fds.pop(_SPARES)))
        foreign = {int(seat): int(slot) for seat, slot in message["seats"].items()}
        for label in list(fds):
            if (seat := seat_of(label)) is not None:
                seats.add_foreign(seat, socket.socket(fileno=fds.pop(label)))
        if (fd := fds.pop(_ADMIN, None)) is not None:
            self.admin = socket.socket(fileno=fd)
            self.admin.setblocking(False)
        for fd in fds.values():
            os.close(fd)
        self.heritage = Heritage(
            book=SocketBook(before=bounds),
            seats=seats,
            foreign=foreign,
            tickets={name: unpack_bytes(data) for name, data in message["tickets"].items()},
            secret=unpack_bytes(message["secret"]),
            states=[
                (str(pool), str(id_), str(state), str(cause)) for pool, id_, state, cause in message["states"]
            ],
            is_upgrade=True,
        )
        self.kept = {str(name): int(inode) for name, inode in message["kept"].items()}
        for change in message["changes"]:
            kind = change.pop("kind")
            if kind in _CHANGES:
                self.changes.append(_CHANGES[kind](**change))

    async def wait_for_go(self, deployment: Deployment) -> None:
        """All is ready. Until the other one's workers know of ours. Raises `StartError`."""
        own = deployment.seats.own
        places = {seat: slot for seat, slot in deployment.fleet.places().items() if seat in own}
        try:
            parcels.send(self._parcels, [deployment.seats.writer(seat) for seat in places])
        except parcels.ParcelError as error:
            raise StartError(f"the gateway that was to be taken over from {error.strerror}") from None
        self._channel.send(
            {
                "type": "ready",
                "seats": {str(seat): slot for seat, slot in places.items()},
                "xdp_pins": deployment.xdp.pin_path,
            }
        )
        try:
            async with asyncio.timeout(GO_S):
                message = await self._channel.receive()
        except TimeoutError:
            message = None
        if message is None or message["type"] != "go":
            raise StartError("the gateway that was to be taken over from does not give way")

    async def wait_until_left(self) -> None:
        """We serve. Until its workers read the sockets no more, or it is gone."""
        self._channel.send({"type": "serving"})
        try:
            async with asyncio.timeout(SERVING_S):
                await self._channel.receive()
        except TimeoutError:
            log.warning("the gateway that was taken over from does not stop accepting")
        self._channel.close()
        self._parcels.close()


def _unpacked(one: dict[str, Any], fds: dict[str, int]) -> Bound:
    members = []
    for index in range(one["members"]):
        member = socket.socket(fileno=fds.pop(f"{_MEMBER} {one['number']} {index}"))
        member.setblocking(False)
        members.append(member)
    return Bound(
        one["name"],
        one["is_datagram"],
        Address(*one["address"]),
        members,
        one["number"],
        one["kind"],
        Address(*one["wanted"]),
        one["is_spread"],
        one["lasting"],
    )
