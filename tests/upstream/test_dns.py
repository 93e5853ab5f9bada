"""The resolver against a DNS server on loopback: addresses."""

from __future__ import annotations

import asyncio
import math
import socket
from typing import TYPE_CHECKING, Any

import dns.flags
import dns.message
import dns.rdatatype
import pytest

from expressgateway.upstream import dns as module
from expressgateway.upstream.dns import Resolver
from expressgateway.upstream.dns_answers import Answer
from tests.upstream.name_server import FAULTS, Bench, name_server, silence, whole

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from pathlib import Path


def run(test: Callable[[Bench], Coroutine[Any, Any, None]], files: Path, **settings: Any) -> None:
    async def main() -> None:
        async with name_server() as server:
            server.put("web.example.", "A", "192.0.2.1", "192.0.2.2")
            server.put("web.example.", "AAAA", "2001:db8::1", ttl=90)
            bench = Bench(server, files, **settings)
            await test(bench)
            bench.resolver.close()

    asyncio.run(main())


BOTH = ("192.0.2.1", "192.0.2.2", "2001:db8::1")


class TestWithoutDns:
    @pytest.mark.parametrize("literal", ["192.0.2.1", "2001:db8::1", "::", "fe80::1%eth0"])
    def test_a_literal_holds_for_ever(self, tmp_path: Path, literal: str) -> None:
        async def test(bench: Bench) -> None:
            assert await bench.ask(literal) == Answer((literal,), math.inf)
            assert bench.server.asked == []

        run(test, tmp_path)

    @pytest.mark.parametrize("name", ["localhost", "LocalHost", "localhost.", "api.localhost"])
    def test_localhost_needs_no_file(self, tmp_path: Path, name: str) -> None:
        async def test(bench: Bench) -> None:
            assert await bench.ask(name) == Answer(("127.0.0.1", "::1"), 5.0)
            assert bench.server.asked == []

        run(test, tmp_path)

    def test_the_hosts_file_comes_before_dns(self, tmp_path: Path) -> None:
        async def test(bench: Bench) -> None:
            bench.hosts.write_text(
                "# comment\n\n127.0.0.1 localhost\nnonsense web.example\n"
                "10.0.0.2 WEB.example alias # web.example2\n10.0.0.1\tweb.example.\n"
                "10.0.0.1 web.example\nfd00::1 alias\n"
            )
            assert await bench.ask() == Answer(("10.0.0.1", "10.0.0.2"), 5.0)
            assert await bench.ask("Alias") == Answer(("10.0.0.2", "fd00::1"), 5.0)
            assert (await bench.ask("localhost")).addresses == ("127.0.0.1",)
            assert bench.server.asked == []

        run(test, tmp_path)

    def test_the_hosts_file_is_read_again_when_it_changed(self, tmp_path: Path) -> None:
        async def test(bench: Bench) -> None:
            assert (await bench.ask()).addresses == BOTH
            bench.hosts.write_text("10.0.0.1 web.example\n")
            assert (await bench.ask()).addresses == ("10.0.0.1",)
            bench.hosts.write_text("10.0.0.22 web.example\n")
            assert (await bench.ask()).addresses == ("10.0.0.22",)
            bench.hosts.unlink()
            assert (await bench.ask()).addresses == BOTH

        run(test, tmp_path)

    def test_a_hosts_file_that_is_not_text(self, tmp_path: Path) -> None:
        async def test(bench: Bench) -> None:
            bench.hosts.write_bytes(bytes(range(256)) * 100)
            assert (await bench.ask()).addresses == BOTH

        run(test, tmp_path)


class TestAnswers:
    def test_a_and_aaaa_with_the_shorter_ttl(self, tmp_path: Path) -> None:
        async def test(bench: Bench) -> None:
            assert await bench.ask() == Answer(BOTH, 60.0)
            assert sorted(bench.server.asked) == [("web.example.", "A"), ("web.example.", "AAAA")]

        run(test, tmp_path)

    def test_only_one_family(self, tmp_path: Path) -> None:
        async def test(bench: Bench) -> None:
            bench.server.put("four.example.", "A", "192.0.2.4", ttl=30)
            bench.server.put("six.example.", "AAAA", "2001:db8::6", ttl=30)
            assert await bench.ask("four.example") == Answer(("192.0.2.4",), 30.0)
            assert await bench.ask("six.example") == Answer(("2001:db8::6",), 30.0)

        run(test, tmp_path)

    def test_an_alias_with_a_short_life(self, tmp_path: Path) -> None:
        async def test(bench: Bench) -> None:
            bench.server.put("www.example.", "CNAME", "web.example.", ttl=7)
            assert await bench.ask("www.example") == Answer(BOTH, 7.0)

        run(test, tmp_path)

    def test_it_is_kept_for_its_ttl_and_counts_down(self, tmp_path: Path) -> None:
        async def test(bench: Bench) -> None:
            await bench.ask()
            bench.clock.time += 59.0
            assert await bench.ask() == Answer(BOTH, 1.0)
            assert await bench.ask("WEB.example") == Answer(BOTH, 1.0)
            assert len(bench.server.asked) == 2
            bench.clock.time += 1.0
            assert await bench.ask() == Answer(BOTH, 60.0)
            assert len(bench.server.asked) == 4
            assert bench.resolver.counters.queries == 2

        run(test, tmp_path)

    @pytest.mark.parametrize(
        ("ttl", "held"), [(0, 1.0), (1, 1.0), (300, 300.0), (301, 300.0), (1 << 30, 300.0)]
    )
    def test_ttls_are_clamped(self, tmp_path: Path, ttl: int, held: float) -> None:
        async def test(bench: Bench) -> None:
            bench.server.put("x.example.", "A", "192.0.2.1", ttl=ttl)
            assert (await bench.ask("x.example")).ttl_s == held

        run(test, tmp_path)

    def test_an_answer_that_flips(self, tmp_path: Path) -> None:
        async def test(bench: Bench) -> None:
            for number in range(1, 6):
                bench.server.put("web.example.", "A", f"192.0.2.{number}")
                bench.server.zone.pop(("web.example.", "AAAA"), None)
                assert await bench.ask() == Answer((f"192.0.2.{number}",), 60.0)
                bench.clock.time += 60.0

        run(test, tmp_path)

    def test_the_order_of_the_server_means_nothing(self, tmp_path: Path) -> None:
        async def test(bench: Bench) -> None:
            first = await bench.ask()
            bench.server.put("web.example.", "A", "192.0.2.2", "192.0.2.1")
            bench.clock.time += 60.0
            assert await bench.ask() == first

        run(test, tmp_path)

    def test_five_hundred_addresses(self, tmp_path: Path) -> None:
        async def test(bench: Bench) -> None:
            many = [f"10.0.{number // 250}.{number % 250}" for number in range(500)]
            bench.server.put("many.example.", "A", *many)
            for _ in range(2):
                answer = await bench.ask("many.example")
                assert answer.addresses == tuple(many[:256])
                assert answer.left_out == 244
                bench.server.put("many.example.", "A", *reversed(many))
                bench.clock.time += 60.0

        run(test, tmp_path)

    def test_a_truncated_answer_is_asked_for_over_tcp(self, tmp_path: Path) -> None:
        async def test(bench: Bench) -> None:
            def truncate(reply: dns.message.Message) -> bytes:
                reply.answer.clear()
                reply.flags |= dns.flags.TC
                return reply.to_wire()

            bench.server.mangle = truncate
            assert (await bench.ask()).addresses == BOTH

        run(test, tmp_path)

    def test_the_search_list_of_resolv_conf(self, tmp_path: Path) -> None:
        async def test(bench: Bench) -> None:
            bench.resolv_conf.write_text("search nowhere.example example\noptions ndots:1\n")
            assert (await bench.ask("web")).addresses == BOTH
            bench.resolv_conf.write_text("search nowhere.example\n")
            bench.clock.time += 60.0
            assert (await bench.fails("web")).is_negative

        run(test, tmp_path)

    def test_without_resolv_conf_the_local_server_is_asked(self, tmp_path: Path) -> None:
        resolver = Resolver(resolv_conf_path=str(tmp_path / "none"))
        assert resolver._configured_stub().nameservers == ["127.0.0.1"]


class TestNegativeAnswers:
    def test_a_name_that_does_not_exist(self, tmp_path: Path) -> None:
        async def test(bench: Bench) -> None:
            error = await bench.fails("no.example")
            assert str(error) == "no.example does not exist, says DNS"
            assert error.is_negative
            asked = len(bench.server.asked)
            bench.clock.time += 4.9
            await bench.fails("no.example")
            assert len(bench.server.asked) == asked
            bench.server.put("no.example.", "A", "192.0.2.7")
            bench.clock.time += 0.1
            assert (await bench.ask("no.example")).addresses == ("192.0.2.7",)

        run(test, tmp_path)

    def test_a_name_without_addresses(self, tmp_path: Path) -> None:
        async def test(bench: Bench) -> None:
            bench.server.put("mail.example.", "MX", "10 web.example.")
            error = await bench.fails("mail.example")
            assert str(error) == "mail.example has no addresses"
            assert error.is_negative
            assert bench.resolver.counters.failures == 0

        run(test, tmp_path)

    def test_a_name_that_is_gone_is_gone(self, tmp_path: Path) -> None:
        async def test(bench: Bench) -> None:
            await bench.ask()
            bench.server.zone.clear()
            bench.clock.time += 60.0
            assert (await bench.fails()).is_negative

        run(test, tmp_path)

    def test_one_family_that_is_gone_is_gone(self, tmp_path: Path) -> None:
        async def test(bench: Bench) -> None:
            await bench.ask()
            del bench.server.zone["web.example.", "A"]
            bench.clock.time += 60.0
            assert await bench.ask() == Answer(("2001:db8::1",), 90.0)

        run(test, tmp_path)

    @pytest.mark.parametrize(
        "name", ["", ".", "a..b", "x" * 64 + ".example", "x." * 200, "\udcff.example", "a b\0c"]
    )
    def test_a_name_that_is_none(self, tmp_path: Path, name: str) -> None:
        async def test(bench: Bench) -> None:
            await bench.fails(name)

        run(test, tmp_path)


class TestFailures:
    @pytest.mark.parametrize("fault", FAULTS)
    def test_without_a_last_good_answer(
        self, tmp_path: Path, fault: Callable[[dns.message.Message], bytes | None]
    ) -> None:
        async def test(bench: Bench) -> None:
            bench.break_with(fault)
            error = await bench.fails()
            assert str(error).startswith("web.example ")
            assert not error.is_negative
            asked = len(bench.server.asked)
            bench.clock.time += 4.9
            assert str(await bench.fails()) == str(error)
            assert len(bench.server.asked) == asked

        run(test, tmp_path)

    @pytest.mark.parametrize("fault", FAULTS)
    def test_the_last_good_answer_is_kept(
        self, tmp_path: Path, fault: Callable[[dns.message.Message], bytes | None]
    ) -> None:
        async def test(bench: Bench) -> None:
            await bench.ask()
            bench.break_with(fault)
            bench.clock.time += 10_000.0
            assert await bench.ask() == Answer(BOTH, 5.0, stale=True)
            asked = len(bench.server.asked)
            assert await bench.ask() == Answer(BOTH, 5.0, stale=True)
            assert len(bench.server.asked) == asked
            bench.clock.time += 5.0
            assert await bench.ask() == Answer(BOTH, 5.0, stale=True)
            assert len(bench.server.asked) > asked
            assert bench.resolver.counters.failures == 2
            assert bench.resolver.counters.stale_served == 3
            bench.mend()
            bench.clock.time += 5.0
            assert await bench.ask() == Answer(BOTH, 60.0)

        run(test, tmp_path)

    def test_one_family_that_fails_keeps_its_addresses(self, tmp_path: Path) -> None:
        async def test(bench: Bench) -> None:
            def only_a(reply: dns.message.Message) -> bytes | None:
                return whole(reply) if reply.question[0].rdtype == dns.rdatatype.A else None

            await bench.ask()
            bench.break_with(only_a)
            bench.server.put("web.example.", "A", "192.0.2.9")
            bench.clock.time += 60.0
            assert await bench.ask() == Answer(("192.0.2.9", "2001:db8::1"), 5.0, stale=True)

        run(test, tmp_path)

    def test_nobody_listens(self, tmp_path: Path) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as reserved:
            reserved.bind(("127.0.0.1", 0))
            port = reserved.getsockname()[1]

        async def test(bench: Bench) -> None:
            assert "web.example was not resolved: " in str(await bench.fails())

        run(test, tmp_path, nameservers=[("127.0.0.1", port)], total_timeout_s=0.1)

    def test_the_second_server_answers_for_the_first(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with name_server() as dead, name_server() as alive:
                dead.mangle = silence
                alive.put("web.example.", "A", "192.0.2.1")
                ports = [("127.0.0.1", dead.port), ("127.0.0.1", alive.port)]
                bench = Bench(alive, tmp_path, nameservers=ports, query_timeout_s=0.2)
                assert (await bench.ask()).addresses == ("192.0.2.1",)
                assert dead.asked

        asyncio.run(main())


class TestSharing:
    def test_one_query_for_all_who_ask_at_once(self, tmp_path: Path) -> None:
        async def test(bench: Bench) -> None:
            answers = await asyncio.gather(*(bench.ask() for _ in range(50)))
            assert set(answers) == {Answer(BOTH, 60.0)}
            assert bench.resolver.counters.queries == 1
            assert len(bench.server.asked) == 2
            assert "asking=0" in repr(bench.resolver)

        run(test, tmp_path)

    def test_one_who_gives_up_does_not_disturb_the_others(self, tmp_path: Path) -> None:
        async def test(bench: Bench) -> None:
            bench.server.mangle = silence
            impatient = asyncio.ensure_future(bench.ask())
            patient = asyncio.ensure_future(bench.ask())
            await bench.server.changed.wait()
            impatient.cancel()
            with pytest.raises(asyncio.CancelledError):
                await impatient
            bench.server.mangle = whole
            assert (await patient).addresses == BOTH

        run(test, tmp_path, query_timeout_s=0.2)

    def test_close_ends_the_waiting(self, tmp_path: Path) -> None:
        async def test(bench: Bench) -> None:
            bench.server.mangle = silence
            waiting = asyncio.ensure_future(bench.ask())
            await bench.server.changed.wait()
            bench.resolver.close()
            bench.resolver.close()
            with pytest.raises(asyncio.CancelledError):
                await waiting

        run(test, tmp_path, total_timeout_s=30.0, query_timeout_s=30.0)

    def test_names_are_bounded_and_the_one_unused_longest_goes(self, tmp_path: Path) -> None:
        async def test(bench: Bench) -> None:
            for number in range(4):
                bench.server.put(f"{number}.example.", "A", "192.0.2.1")
            for name in ("0.example", "1.example", "2.example", "0.example", "3.example"):
                await bench.ask(name)
            bench.server.asked.clear()
            for name in ("0.example", "2.example", "3.example"):
                await bench.ask(name)
            assert bench.server.asked == []
            await bench.ask("1.example")
            assert len(bench.server.asked) == 2
            assert "names=3 " in repr(bench.resolver)

        run(test, tmp_path, max_names=3)

    def test_questions_under_way_are_bounded(self, tmp_path: Path) -> None:
        async def test(bench: Bench) -> None:
            bench.break_with(silence)
            asking = [asyncio.ensure_future(bench.fails(f"{number}.example")) for number in range(2)]
            await bench.server.changed.wait()
            assert "2 other names are being asked for" in str(await bench.fails("one-more.example"))
            await asyncio.gather(*asking)

        run(test, tmp_path, max_names=2)

    def test_names_asked_about_at_one_time_are_bounded(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "MAX_AT_ONCE", 2)

        async def test(bench: Bench) -> None:
            bench.break_with(silence)
            asking = [asyncio.ensure_future(bench.fails(f"{number}.example")) for number in range(5)]
            await bench.server.changed.wait()
            assert bench.resolver.counters.queries == 2
            await asyncio.gather(*asking)
            assert bench.resolver.counters.queries == 5

        run(test, tmp_path)

    def test_an_error_raised_often_does_not_grow(self, tmp_path: Path) -> None:
        async def test(bench: Bench) -> None:
            first, second = await bench.fails("no.example"), await bench.fails("no.example")
            assert first is not second

        run(test, tmp_path)
