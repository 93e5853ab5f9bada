"""Ticket keys: the schedule alone, and resumption by `openssl s_client` across processes that share keys."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import ssl
import subprocess
import sys
import weakref
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expressgateway.net import tickets, tls
from expressgateway.net.tickets import (
    MAX_KEYS,
    TicketKeySchedule,
    TicketsUnavailable,
    install_ticket_keys,
    pack_keys,
    unpack_keys,
)
from expressgateway.net.tls import ServerTls
from tests.net.tls_peers import alice, ca, handshake, needs_openssl, s_client, site, trusting

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

TLS_1_2, TLS_1_3 = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3
both_versions = pytest.mark.parametrize("version", [TLS_1_2, TLS_1_3], ids=["tls1_2", "tls1_3"])


# --- the schedule -------------------------------------------------------------------------------------------


def numbered() -> TicketKeySchedule:
    """Keys 0, 1, 2 ...: every 10 seconds a new one, which opens for another 25."""
    count = iter(range(256))
    return TicketKeySchedule(10, 25, random=lambda size: bytes([next(count)]) * size)


def numbers(keys: Sequence[tickets.TicketKey]) -> list[int]:
    return [key.secret[0] for key in keys]


class TestSchedule:
    def test_rotates_and_retires(self) -> None:
        schedule = numbered()
        assert schedule.next_change_at() == -math.inf
        story = [
            (t, numbers(schedule.keys_at(t)), schedule.next_change_at()) for t in (0, 9, 10, 21, 34, 35, 60)
        ]
        assert story == [
            (0, [0], 10),
            (9, [0], 10),
            (10, [1, 0], 20),
            (21, [2, 1, 0], 31),
            (34, [3, 2, 1, 0], 35),  # 0 was superseded at 10
            (35, [3, 2, 1], 44),
            (60, [4, 3], 70),  # late: one new key, not three; 3 opens from its end at 60
        ]

    def test_the_list_is_the_same_object_while_nothing_changes(self) -> None:
        schedule = numbered()
        assert schedule.keys_at(0) is schedule.keys_at(9)
        assert schedule.keys_at(10) is not schedule.keys_at(9.9) or len(schedule.keys_at(10)) == 2

    def test_no_overlap_means_one_key(self) -> None:
        schedule = TicketKeySchedule(10, 0)
        first = schedule.keys_at(0)
        assert len(schedule.keys_at(10)) == 1
        assert schedule.keys_at(10)[0].secret != first[0].secret

    def test_a_clock_that_steps_back_takes_no_key_away_and_none_lives_on(self) -> None:
        schedule = numbered()
        schedule.keys_at(1000)
        schedule.keys_at(1010)
        assert numbers(schedule.keys_at(5)) == [1, 0]
        assert schedule.next_change_at() == 15
        assert numbers(schedule.keys_at(15)) == [2, 1, 0]
        assert numbers(schedule.keys_at(30)) == [3, 2, 1]

    def test_survives_a_change_of_process_and_of_settings(self) -> None:
        schedule = numbered()
        schedule.keys_at(0)
        schedule.keys_at(10)
        heir = TicketKeySchedule(100, 5)
        heir.restore(schedule.dump())
        assert numbers(heir.keys_at(14)) == [1, 0]
        assert numbers(heir.keys_at(15)) == [1]
        assert heir.next_change_at() == 110

    @pytest.mark.parametrize(
        "dumped",
        [b"", b"{", b"1", b"[1]", b'[["00", 0, null]]', b'[["zz", 0, null]]', b"\xff"],
    )
    def test_restores_nothing_else(self, dumped: bytes) -> None:
        schedule = numbered()
        kept = schedule.keys_at(0)
        with pytest.raises(ValueError, match="not a dump of ticket keys"):
            schedule.restore(dumped)
        assert schedule.keys_at(0) is kept

    def test_restores_only_in_order(self) -> None:
        rows = json.loads(numbered_dump())
        with pytest.raises(ValueError, match="wrong length or order"):
            numbered().restore(json.dumps(rows[::-1]).encode())

    @pytest.mark.parametrize("times", [(0, 1), (-1, 1), (math.nan, 1), (1, -1), (1, math.inf), (1, 63)])
    def test_settings_out_of_range(self, times: tuple[float, float]) -> None:
        with pytest.raises(ValueError, match="the ticket rotation"):
            TicketKeySchedule(*times)

    def test_keys_do_not_show_in_logs(self) -> None:
        key = TicketKeySchedule(1, 1).keys_at(0)[0]
        assert key.secret.hex() not in repr(key)
        assert repr(key.secret) not in repr(key)

    @settings(max_examples=200)
    @given(
        interval=st.floats(0.1, 1000),
        overlaps=st.floats(0, MAX_KEYS - 2),
        steps=st.lists(st.floats(0, 3000), max_size=100),
    )
    def test_a_ticket_opens_for_the_overlap_whenever_it_was_given(
        self, interval: float, overlaps: float, steps: list[float]
    ) -> None:
        schedule = TicketKeySchedule(interval, interval * overlaps)
        now, given_at = 0.0, {}
        for step in steps:
            now += step
            keys = schedule.keys_at(now)
            assert 1 <= len(keys) <= MAX_KEYS
            assert schedule.next_change_at() > now
            given_at[keys[0].secret] = now
            good = {key.secret for key in keys}
            for secret, at in given_at.items():
                if now < at + interval * overlaps:
                    assert secret in good


def numbered_dump() -> bytes:
    schedule = numbered()
    schedule.keys_at(0)
    schedule.keys_at(10)
    return schedule.dump()


def test_packed_keys() -> None:
    keys = numbered()
    keys.keys_at(0)
    packed = pack_keys(keys.keys_at(10))
    assert numbers(unpack_keys(packed)) == [1, 0]
    for wrong in (b"", packed[:-1], packed[:80] * (MAX_KEYS + 1)):
        with pytest.raises(ValueError, match="packed ticket keys"):
            unpack_keys(wrong)


# --- in one process -----------------------------------------------------------------------------------------


def server(version: ssl.TLSVersion, **options: object) -> ServerTls:
    made = ServerTls([site("a.test").pair, site("b.test").pair], **options)  # type: ignore[arg-type]  # by keyword
    made.context.maximum_version = version
    return made


@both_versions
class TestResumption:
    def test_rotation(self, version: ssl.TLSVersion) -> None:
        schedule, client = numbered(), trusting()
        one, two = server(version), server(version)
        for worker in (one, two):
            worker.install_tickets(schedule.keys_at(0))
            assert worker.is_tickets_rotating
        session = handshake(one.context, client)[1].session
        assert session is not None
        assert handshake(two.context, client, session=session)[1].session_reused
        two.install_tickets(schedule.keys_at(10))
        resumed = handshake(two.context, client, session=session)[1]
        assert resumed.session_reused
        renewed = resumed.session  # sealed with the new key
        schedule.keys_at(20)
        schedule.keys_at(30)
        two.install_tickets(schedule.keys_at(36))  # the first key is gone
        assert not handshake(two.context, client, session=session)[1].session_reused
        assert handshake(two.context, client, session=renewed)[1].session_reused

    def test_a_ticket_under_the_current_key_is_renewed_where_it_serves_once(
        self, version: ssl.TLSVersion
    ) -> None:
        worker, client = server(version), trusting()
        worker.install_tickets(numbered().keys_at(0))
        session = handshake(worker.context, client)[1].session
        resumed = handshake(worker.context, client, session=session)[1]
        assert resumed.session_reused
        assert (resumed.session != session) is (version is TLS_1_3)

    def test_holds_for_every_virtual_host(self, version: ssl.TLSVersion) -> None:
        keys, client = numbered().keys_at(0), trusting()
        one, two = server(version), server(version)
        one.install_tickets(keys)
        two.install_tickets(keys)
        session = handshake(one.context, client, "b.test")[1].session
        assert handshake(two.context, client, "b.test", session)[1].session_reused

    def test_a_client_certificate_is_not_bypassed(self, version: ssl.TLSVersion) -> None:
        keys = numbered().keys_at(0)
        policies: list[dict[str, object]] = [
            {},
            {"client_auth": "optional", "client_ca_pem": ca().pem},
            {"client_auth": "required", "client_ca_pem": ca().pem},
            {"client_auth": "required", "client_ca_pem": ca().pem + alice().pem},
        ]
        workers = [server(version, **policy) for policy in policies]
        for worker in workers:
            worker.install_tickets(keys)
        client = trusting(certificate=alice().pair)
        sessions = [handshake(worker.context, client)[1].session for worker in workers]
        for at, session in enumerate(sessions):
            for other, worker in enumerate(workers):
                near, far = handshake(worker.context, client, session=session)
                assert far.session_reused is (at == other)
                assert (tls.client_subject(near) is not None) is (other > 0)  # also when resumed

    def test_a_damaged_ticket_is_a_full_handshake(self, version: ssl.TLSVersion) -> None:
        one, two, client = server(version), server(version), trusting()
        schedule = numbered()
        first = schedule.keys_at(0)[0].secret
        one.install_tickets(schedule.keys_at(0))
        session = handshake(one.context, client)[1].session
        two.install_tickets(schedule.keys_at(0))
        # The name is known and the key behind it is another: what a forged ticket looks like.
        (ring,) = [r for r in vars(two.context).values() if isinstance(r, tickets._KeyRing)]
        for key in ring._keys[0].values():
            key.mac_key = bytes(32)
        assert first == schedule.keys_at(0)[0].secret
        assert not handshake(two.context, client, session=session)[1].session_reused

    def test_a_failing_callback_costs_the_ticket_and_nothing_else(
        self, version: ssl.TLSVersion, capfd: pytest.CaptureFixture[str]
    ) -> None:
        worker, client = server(version), trusting()
        worker.install_tickets(numbered().keys_at(0))
        session = handshake(worker.context, client)[1].session
        (ring,) = [r for r in vars(worker.context).values() if isinstance(r, tickets._KeyRing)]
        ring._keys[0] = {}
        far = handshake(worker.context, client, session=session)[1]
        assert not far.session_reused
        assert capfd.readouterr().err == ""

    def test_a_reload_in_the_middle_of_a_handshake_still_gives_a_ticket(
        self, version: ssl.TLSVersion
    ) -> None:
        keys, client = numbered().keys_at(0), trusting()
        workers = [server(version)]
        workers[0].install_tickets(keys)

        def reload() -> None:
            workers.clear()
            gc.collect()

        session = handshake(workers[0].context, client, "b.test", between=reload)[1].session
        fresh = server(version)
        fresh.install_tickets(keys)
        assert handshake(fresh.context, client, "b.test", session)[1].session_reused

    def test_one_key_only_where_openssl_has_no_callback(
        self, version: ssl.TLSVersion, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tickets.LibSsl.open(), "aes_256_cbc", None)  # as before OpenSSL 3
        schedule, client = numbered(), trusting()
        one, two = server(version), server(version)
        for worker in (one, two):
            worker.install_tickets(schedule.keys_at(0))
            assert not worker.is_tickets_rotating
        session = handshake(one.context, client)[1].session
        assert handshake(two.context, client, session=session)[1].session_reused
        two.install_tickets(schedule.keys_at(10))
        assert not handshake(two.context, client, session=session)[1].session_reused


def test_the_context_keeps_no_sessions_of_its_own() -> None:
    """A TLS 1.2 client without tickets would leave a session in the memory of one worker."""
    worker, client = server(TLS_1_2), trusting()
    worker.install_tickets(numbered().keys_at(0))
    client.options |= ssl.OP_NO_TICKET
    connections = [handshake(worker.context, client) for _ in range(3)]  # OpenSSL forgets abandoned ones
    assert len(connections) == 3
    assert worker.context.session_stats()["number"] == 0


def test_needs_a_key() -> None:
    with pytest.raises(ValueError, match="at least one"):
        install_ticket_keys(server(TLS_1_3).context, ())


def test_building_and_dropping_leaks_nothing() -> None:
    keys, client = numbered().keys_at(0), trusting()

    def cycle() -> list[weakref.ref[object]]:
        worker = server(TLS_1_3)
        worker.install_tickets(keys)
        worker.install_tickets(keys)
        handshake(worker.context, client, "b.test")
        (ring,) = [r for r in vars(worker.context).values() if isinstance(r, tickets._KeyRing)]
        return [weakref.ref(worker.context), weakref.ref(ring.callback)]

    def resident_kib() -> int:
        with open("/proc/self/statm", encoding="ascii") as statm:
            return int(statm.read().split()[1]) * 4

    for _ in range(50):
        cycle()
    gc.collect()
    gc.disable()
    try:
        before = resident_kib()
        left = [ref() for _ in range(200) for ref in cycle()]
        grown = resident_kib() - before
    finally:
        gc.enable()
    assert left == [None] * 400
    assert grown < 1024  # KiB; one context alone is about 30


# --- guards -------------------------------------------------------------------------------------------------


class TestGuards:
    @pytest.fixture(autouse=True)
    def unopened(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tickets.LibSsl, "_opened", None)

    def refuses(self, reason: str) -> None:
        worker = server(TLS_1_3)
        with pytest.raises(TicketsUnavailable, match=reason):
            worker.install_tickets(numbered().keys_at(0))
        handshake(worker.context, trusting())  # the context goes on without

    def test_no_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("_ssl.__file__", "/nonexistent/_ssl.so")
        self.refuses("cannot be called from outside")

    def test_a_build_that_hides_its_openssl(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import _json  # an extension module without OpenSSL behind it

        monkeypatch.setattr("_ssl.__file__", _json.__file__)
        self.refuses("cannot be called from outside: .*undefined symbol")

    def test_another_openssl(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ssl, "OPENSSL_VERSION_NUMBER", 0x30500000)
        self.refuses("not the one that Python's ssl module reports")

    @pytest.mark.parametrize(
        "address",
        [0x1, 0x7, 0xDEADBEE8, 1 << 63, id(object) + 1],
        ids=["one", "odd", "unmapped", "high", "inside"],
    )
    def test_no_pointer_where_it_should_be(self, monkeypatch: pytest.MonkeyPatch, address: int) -> None:
        monkeypatch.setattr(tickets.LibSsl, "pointer_of", lambda _self, _context: address)
        self.refuses("is not a pointer")

    def test_a_pointer_to_something_else(self, monkeypatch: pytest.MonkeyPatch) -> None:
        other = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        where = tickets.LibSsl().pointer_of(other)
        monkeypatch.setattr(tickets.LibSsl, "pointer_of", lambda _self, _context: where)
        self.refuses("does not read as Python describes it")

    def test_read_only_memory_is_no_context(self) -> None:
        with open("/proc/self/maps", encoding="ascii") as maps:
            first = next(int(line.split("-")[0], 16) for line in maps if " r--p " in line)
        assert not tickets.is_writable_memory(first)
        assert not tickets.is_writable_memory(0)


# --- two processes, and a client we did not write -----------------------------------------------------------

WORKER = """
import json, socket, ssl, sys, threading
from expressgateway.net.tickets import unpack_keys
from expressgateway.net.tls import CertificatePair, ServerTls
start = json.loads(sys.stdin.readline())
server = ServerTls([CertificatePair(c.encode(), k.encode()) for c, k in start["pairs"]])
server.install_tickets(unpack_keys(bytes.fromhex(start["keys"])))
listener = socket.create_server(("127.0.0.1", 0))
def serve():
    while True:
        raw, _ = listener.accept()
        raw.settimeout(20)
        try:
            with server.context.wrap_socket(raw, server_side=True) as connection:
                connection.sendall(b"served")
                connection.unwrap()
        except OSError as error:
            print(error, file=sys.stderr)
threading.Thread(target=serve, daemon=True).start()
print(listener.getsockname()[1], flush=True)
for line in sys.stdin:
    server.install_tickets(unpack_keys(bytes.fromhex(line)))
    print("installed", flush=True)
"""


class Worker:
    """One process with its own OpenSSL: what it knows of keys came through its stdin."""

    def __init__(self, process: subprocess.Popen[str], keys: Sequence[tickets.TicketKey]) -> None:
        self.process = process
        pairs = [
            [p.cert_pem.decode(), p.key_pem.decode()] for p in (site("a.test").pair, site("b.test").pair)
        ]
        self.port = int(self.ask(json.dumps({"pairs": pairs, "keys": pack_keys(keys).hex()})))

    def ask(self, line: str) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def install(self, keys: Sequence[tickets.TicketKey]) -> None:
        assert self.ask(pack_keys(keys).hex()) == "installed"


@contextlib.contextmanager
def workers(count: int, keys: Sequence[tickets.TicketKey]) -> Iterator[list[Worker]]:
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                )
            )
            for _ in range(count)
        ]
        try:
            yield [Worker(process, keys) for process in processes]
        finally:
            for process in processes:
                process.kill()


@needs_openssl
@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
@pytest.mark.parametrize("name", ["a.test", "b.test"], ids=["default", "switched"])
def test_openssl_resumes_on_another_worker(tmp_path: Path, version: str, name: str) -> None:
    schedule = numbered()
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    with workers(2, schedule.keys_at(0)) as (one, two):

        def visit(worker: Worker, *session: str) -> str:
            said = s_client(worker.port, version, "-servername", name, *session)
            assert "served" in said, said
            return "Reused" if "\nReused, TLSv1" in said else "New" if "\nNew, TLSv1" in said else said

        assert visit(one, "-sess_out", first) == "New"
        assert visit(two, "-sess_in", first) == "Reused"
        # Within the overlap the old ticket opens.
        schedule.keys_at(10)
        two.install(schedule.keys_at(20))
        assert visit(two, "-sess_in", first) == "Reused"
        assert visit(two, "-sess_out", second) == "New"
        # A worker that was not told yet does a full handshake, no more.
        assert visit(one, "-sess_in", second) == "New"
        one.install(schedule.keys_at(36))
        two.install(schedule.keys_at(36))
        assert visit(two, "-sess_in", first) == "New"
        assert visit(one, "-sess_in", second) == "Reused"


@needs_openssl
def test_other_keys_do_not_open(tmp_path: Path) -> None:
    session = str(tmp_path / "session")
    with (
        workers(1, TicketKeySchedule(1, 1).keys_at(0)) as (one,),
        workers(1, TicketKeySchedule(1, 1).keys_at(0)) as (two,),
    ):
        assert "\nNew, TLSv1.3" in s_client(one.port, "-sess_out", session)
        assert "\nNew, TLSv1.3" in s_client(two.port, "-sess_in", session)
