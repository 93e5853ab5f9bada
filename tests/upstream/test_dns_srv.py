"""The resolver against a DNS server on loopback: services (RFC 2782)."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import dns.flags
import dns.message
import dns.rdatatype
import dns.rrset
import pytest

from expressgateway.upstream import dns as module
from expressgateway.upstream.discovery import Endpoint
from expressgateway.upstream.dns_answers import SrvAnswer
from tests.upstream.name_server import FAULTS, Bench, name_server, whole

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from pathlib import Path

    Fault = Callable[[dns.message.Message], bytes | None]

NAME = "_http._tcp.example."
TWO = (Endpoint("192.0.2.1", 8080, 10), Endpoint("192.0.2.2", 8081, 20))


def run(test: Callable[[Bench], Coroutine[Any, Any, None]], files: Path, **settings: Any) -> None:
    async def main() -> None:
        async with name_server() as server:
            server.put(NAME, "SRV", "0 10 8080 one.example.", "0 20 8081 two.example.", ttl=60)
            server.put("one.example.", "A", "192.0.2.1", ttl=90)
            server.put("two.example.", "A", "192.0.2.2", ttl=120)
            bench = Bench(server, files, **settings)
            try:
                await test(bench)
            finally:
                bench.resolver.close()

    asyncio.run(main())


def silent_about(*names: str) -> Fault:
    def mangle(reply: dns.message.Message) -> bytes | None:
        return None if reply.question[0].name.to_text() in names else whole(reply)

    return mangle


class TestAnswers:
    def test_hosts_ports_and_weights(self, tmp_path: Path) -> None:
        async def test(bench: Bench) -> None:
            assert await bench.ask_srv() == SrvAnswer(TWO, 60.0)
            assert await bench.ask_srv("_HTTP._tcp.Example") == SrvAnswer(TWO, 60.0)
            assert len(bench.server.asked) == 5
            assert bench.resolver.counters.queries == 3

        run(test, tmp_path)

    def test_the_lowest_priority_alone(self, tmp_path: Path) -> None:
        async def test(bench: Bench) -> None:
            bench.server.put(NAME, "SRV", "5 1 80 one.example.", "7 1 80 two.example.", "5 0 81 one.example.")
            assert (await bench.ask_srv()).endpoints == (
                Endpoint("192.0.2.1", 80, 1),
                Endpoint("192.0.2.1", 81, 0),
            )
            assert ("two.example.", "A") not in bench.server.asked

        run(test, tmp_path)

    def test_every_address_of_a_host(self, tmp_path: Path) -> None:
        async def test(bench: Bench) -> None:
            bench.server.put("one.example.", "A", "192.0.2.9", "192.0.2.1")
            bench.server.put("one.example.", "AAAA", "2001:db8::1")
            assert (await bench.ask_srv()).endpoints == (
                Endpoint("192.0.2.1", 8080, 10),
                TWO[1],
                Endpoint("192.0.2.9", 8080, 10),
                Endpoint("2001:db8::1", 8080, 10),
            )

        run(test, tmp_path)

    @pytest.mark.parametrize(("srv_ttl", "host_ttl", "held"), [(0, 90, 1.0), (60, 7, 7.0), (999, 999, 300.0)])
    def test_the_shortest_ttl(self, tmp_path: Path, srv_ttl: int, host_ttl: int, held: float) -> None:
        async def test(bench: Bench) -> None:
            bench.server.put(NAME, "SRV", "0 1 80 one.example.", ttl=srv_ttl)
            bench.server.put("one.example.", "A", "192.0.2.1", ttl=host_ttl)
            assert (await bench.ask_srv()).ttl_s == held

        run(test, tmp_path)

    def test_what_is_over_is_asked_about_and_nothing_else(self, tmp_path: Path) -> None:
        async def test(bench: Bench) -> None:
            bench.server.put("two.example.", "A", "192.0.2.2", ttl=10)
            await bench.ask_srv()
            bench.clock.time += 10.0
            bench.server.asked.clear()
            bench.server.put("two.example.", "A", "192.0.2.3", ttl=10)
            assert (await bench.ask_srv()).endpoints == (TWO[0], Endpoint("192.0.2.3", 8081, 20))
            assert {name for name, _ in bench.server.asked} == {"two.example."}

        run(test, tmp_path)

    def test_the_order_of_the_server_means_nothing(self, tmp_path: Path) -> None:
        async def test(bench: Bench) -> None:
            first = await bench.ask_srv()
            bench.server.put(NAME, "SRV", "0 20 8081 two.example.", "0 10 8080 one.example.")
            bench.clock.time += 60.0
            assert (await bench.ask_srv()).endpoints == first.endpoints

        run(test, tmp_path)

    def test_what_is_volunteered_beside_the_answer_is_not_believed(self, tmp_path: Path) -> None:
        async def test(bench: Bench) -> None:
            def volunteer(reply: dns.message.Message) -> bytes:
                reply.additional.append(dns.rrset.from_text("one.example.", 60, "IN", "A", "203.0.113.66"))
                return whole(reply)

            bench.server.mangle = volunteer
            assert (await bench.ask_srv()).endpoints == TWO

        run(test, tmp_path)

    def test_the_hosts_file_comes_before_dns(self, tmp_path: Path) -> None:
        async def test(bench: Bench) -> None:
            bench.hosts.write_text("10.0.0.1 one.example\n")
            assert await bench.ask_srv() == SrvAnswer((Endpoint("10.0.0.1", 8080, 10), TWO[1]), 5.0)
            assert ("one.example.", "A") not in bench.server.asked

        run(test, tmp_path)

    def test_an_alias(self, tmp_path: Path) -> None:
        async def test(bench: Bench) -> None:
            bench.server.put("_web._tcp.example.", "CNAME", NAME, ttl=9)
            assert await bench.ask_srv("_web._tcp.example") == SrvAnswer(TWO, 9.0)

        run(test, tmp_path)

    def test_the_search_list_is_for_the_service_and_never_for_its_hosts(self, tmp_path: Path) -> None:
        async def test(bench: Bench) -> None:
            bench.resolv_conf.write_text("search example\noptions ndots:5\n")
            bench.server.put(NAME, "SRV", "0 1 80 one.")
            bench.server.put("one.example.", "A", "203.0.113.66")
            bench.server.put("one.", "A", "192.0.2.1")
            assert (await bench.ask_srv("_http._tcp")).endpoints == (Endpoint("192.0.2.1", 80, 1),)

        run(test, tmp_path)

    def test_a_truncated_answer_is_asked_for_over_tcp(self, tmp_path: Path) -> None:
        async def test(bench: Bench) -> None:
            def truncate(reply: dns.message.Message) -> bytes:
                reply.answer.clear()
                reply.flags |= dns.flags.TC
                return reply.to_wire()

            bench.server.mangle = truncate
            assert (await bench.ask_srv()).endpoints == TWO

        run(test, tmp_path)


class TestNegativeAnswers:
    @pytest.mark.parametrize("records", [["0 0 0 ."], ["0 0 80 ."], ["0 1 0 one.example."]])
    def test_a_service_that_is_not_offered(self, tmp_path: Path, records: list[str]) -> None:
        async def test(bench: Bench) -> None:
            bench.server.put(NAME, "SRV", *records)
            error = await bench.fails_srv()
            assert str(error) == "_http._tcp.example is a service that is not offered, says DNS"
            assert error.is_negative
            asked = len(bench.server.asked)
            bench.clock.time += 4.9
            await bench.fails_srv()
            assert len(bench.server.asked) == asked
            bench.server.put(NAME, "SRV", "0 10 8080 one.example.")
            bench.clock.time += 0.1
            assert (await bench.ask_srv()).endpoints == TWO[:1]

        run(test, tmp_path)

    def test_a_record_that_cannot_be_used_hides_no_other(self, tmp_path: Path) -> None:
        async def test(bench: Bench) -> None:
            bench.server.put(NAME, "SRV", "0 0 0 .", "1 1 0 two.example.", "2 10 8080 one.example.")
            assert (await bench.ask_srv()).endpoints == TWO[:1]

        run(test, tmp_path)

    def test_no_such_service(self, tmp_path: Path) -> None:
        async def test(bench: Bench) -> None:
            bench.server.put("_mail._tcp.example.", "TXT", "x")
            none, others = (
                await bench.fails_srv("_ftp._tcp.example"),
                await bench.fails_srv("_mail._tcp.example"),
            )
            assert str(none) == "_ftp._tcp.example does not exist, says DNS"
            assert str(others) == "_mail._tcp.example has no SRV records"
            assert none.is_negative
            assert others.is_negative

        run(test, tmp_path)

    def test_a_service_that_is_gone_is_gone(self, tmp_path: Path) -> None:
        async def test(bench: Bench) -> None:
            await bench.ask_srv()
            del bench.server.zone[NAME, "SRV"]
            bench.clock.time += 60.0
            assert (await bench.fails_srv()).is_negative

        run(test, tmp_path)

    def test_a_host_that_does_not_exist(self, tmp_path: Path) -> None:
        async def test(bench: Bench) -> None:
            del bench.server.zone["two.example.", "A"]
            assert await bench.ask_srv() == SrvAnswer(TWO[:1], 5.0)
            del bench.server.zone["one.example.", "A"]
            bench.clock.time += 90.0
            error = await bench.fails_srv()
            assert str(error) == "no host of _http._tcp.example has an address, says DNS"
            assert error.is_negative

        run(test, tmp_path)


class TestFailures:
    @pytest.mark.parametrize("fault", FAULTS)
    def test_without_a_last_good_answer(self, tmp_path: Path, fault: Fault) -> None:
        async def test(bench: Bench) -> None:
            bench.break_with(fault)
            error = await bench.fails_srv()
            assert str(error).startswith("_http._tcp.example was not resolved: ")
            assert not error.is_negative

        run(test, tmp_path)

    @pytest.mark.parametrize("fault", FAULTS)
    def test_the_last_good_answer_is_kept(self, tmp_path: Path, fault: Fault) -> None:
        async def test(bench: Bench) -> None:
            await bench.ask_srv()
            bench.break_with(fault)
            bench.clock.time += 10_000.0
            answer = await bench.ask_srv()
            assert answer == SrvAnswer(TWO, 5.0, stale=True)
            assert "was not resolved: " in answer.failure
            bench.mend()
            bench.clock.time += 5.0
            assert await bench.ask_srv() == SrvAnswer(TWO, 60.0)

        run(test, tmp_path)

    def test_records_that_stay_and_hosts_that_move(self, tmp_path: Path) -> None:
        async def test(bench: Bench) -> None:
            await bench.ask_srv()
            bench.break_with(silent_about(NAME))
            bench.server.put("one.example.", "A", "192.0.2.9")
            bench.clock.time += 120.0
            moved = (TWO[1], Endpoint("192.0.2.9", 8080, 10))
            assert await bench.ask_srv() == SrvAnswer(moved, 5.0, stale=True)

        run(test, tmp_path)

    def test_a_host_that_fails_keeps_its_addresses(self, tmp_path: Path) -> None:
        async def test(bench: Bench) -> None:
            await bench.ask_srv()
            bench.break_with(silent_about("two.example."))
            bench.clock.time += 120.0
            assert await bench.ask_srv() == SrvAnswer(TWO, 5.0, stale=True)

        run(test, tmp_path)

    def test_a_host_that_was_never_resolved_holds_no_other_up(self, tmp_path: Path) -> None:
        async def test(bench: Bench) -> None:
            bench.break_with(silent_about("two.example."))
            answer = await bench.ask_srv()
            assert answer == SrvAnswer(TWO[:1], 5.0, stale=True)
            assert answer.failure.startswith(
                "of the service _http._tcp.example, two.example. was not resolved"
            )

        run(test, tmp_path)

    def test_failure_of_all_hosts_is_not_negative(self, tmp_path: Path) -> None:
        async def test(bench: Bench) -> None:
            bench.break_with(silent_about("one.example."))
            del bench.server.zone["two.example.", "A"]
            assert not (await bench.fails_srv()).is_negative

        run(test, tmp_path)

    def test_an_answer_of_another_type(self, tmp_path: Path) -> None:
        async def test(bench: Bench) -> None:
            def other_type(reply: dns.message.Message) -> bytes:
                name = reply.question[0].name.to_text()
                reply.answer = [dns.rrset.from_text(name, 60, "IN", "A", "192.0.2.66")]
                return whole(reply)

            bench.server.mangle = other_type
            assert str(await bench.fails_srv()) == "_http._tcp.example has no SRV records"

        run(test, tmp_path)

    def test_a_record_that_is_cut_short(self, tmp_path: Path) -> None:
        async def test(bench: Bench) -> None:
            def short(reply: dns.message.Message) -> bytes:
                wire = bytearray(whole(reply))
                at = wire.rfind(b"\x1f\x90")  # the port: what follows claims more than there is
                return bytes(wire[: at + 1])

            bench.break_with(short)
            assert not (await bench.fails_srv()).is_negative

        run(test, tmp_path)

    @pytest.mark.parametrize(
        "name", ["", ".", "_h._tcp..", "x" * 64, "_h._tcp." + "x." * 130, "a\0b", "\udcff"]
    )
    def test_a_name_that_is_none(self, tmp_path: Path, name: str) -> None:
        async def test(bench: Bench) -> None:
            await bench.fails_srv(name)

        run(test, tmp_path)


class TestBounds:
    def test_five_hundred_records(self, tmp_path: Path) -> None:
        async def test(bench: Bench) -> None:
            records = [f"0 1 {number} one.example." for number in range(1, 501)]
            for rdata in (records, list(reversed(records))):
                bench.server.put(NAME, "SRV", *rdata)
                answer = await bench.ask_srv()
                assert answer.endpoints == tuple(Endpoint("192.0.2.1", port, 1) for port in range(1, 257))
                assert answer.left_out == 244
                bench.clock.time += 60.0

        run(test, tmp_path)

    def test_two_hosts_of_two_hundred_addresses(self, tmp_path: Path) -> None:
        async def test(bench: Bench) -> None:
            many = [f"10.0.0.{number}" for number in range(200)]
            bench.server.put("one.example.", "A", *many)
            bench.server.put("two.example.", "A", *many)
            answer = await bench.ask_srv()
            assert len(answer.endpoints) == 256
            assert answer.left_out == 144

        run(test, tmp_path)

    def test_the_same_endpoint_twice_is_one_with_the_larger_weight(self, tmp_path: Path) -> None:
        async def test(bench: Bench) -> None:
            bench.server.put(NAME, "SRV", "0 7 80 one.example.", "0 9 80 two.example.", "0 8 80 two.example.")
            bench.server.put("two.example.", "A", "192.0.2.1")
            assert (await bench.ask_srv()).endpoints == (Endpoint("192.0.2.1", 80, 9),)
            bench.server.put(NAME, "SRV", "0 9 80 one.example.", "0 8 80 two.example.")
            bench.clock.time += 60.0
            assert (await bench.ask_srv()).endpoints == (Endpoint("192.0.2.1", 80, 9),)

        run(test, tmp_path)

    def test_hosts_that_do_not_answer_take_no_time_each(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "MAX_AT_ONCE", 2)  # the others wait for their turn

        async def test(bench: Bench) -> None:
            names = [f"dark{number}.example." for number in range(30)]
            records = [f"0 1 80 {name}" for name in names]
            bench.server.put(NAME, "SRV", *records, "0 10 8080 one.example.", "0 20 8081 two.example.")
            await bench.ask("one.example.")
            await bench.ask("two.example.")
            bench.clock.time += 90.0  # the time of one.example is over, and two.example's is not
            bench.break_with(silent_about(*names, "one.example."))
            began = asyncio.get_running_loop().time()
            assert await bench.ask_srv() == SrvAnswer(TWO, 5.0, stale=True)
            assert asyncio.get_running_loop().time() - began < 1.0  # 16 rounds of 0.1 s, if it waited for all

        run(test, tmp_path)
