"""The reactor: whose fault costs whom, what is flushed when, and descriptors that come back as others."""

from __future__ import annotations

import socket

import pytest

from expressgateway.net.reactor import IN, OUT
from tests.net.loopback import World, run


class Guest:
    """A handler's owner."""

    def __init__(self, world: World, name: str = "", trouble: Exception | None = None) -> None:
        self.world = world
        self.name = name
        self.trouble = trouble
        self.near, self.far = socket.socketpair()
        self.near.setblocking(False)
        self.calls: list[str] = []
        world.reactor.add(self.near.fileno(), IN, self.on_ready)

    def on_ready(self, events: int) -> None:
        self.calls.append("ready")
        self.near.recv(100)
        if self.trouble is not None:
            raise self.trouble

    def flush(self) -> None:
        self.calls.append("flush")
        if self.trouble is not None:
            raise self.trouble

    def reset(self) -> None:
        self.calls.append("reset")
        self.close()

    def close(self) -> None:
        self.world.reactor.remove(self.near.fileno())
        self.near.close()
        self.far.close()


class TestSafetyNet:
    def test_a_handler_that_raises_costs_its_owner_only(self) -> None:
        async def test(world: World) -> None:
            guests = [Guest(world), Guest(world, trouble=ValueError("a defect")), Guest(world)]
            for guest in guests:
                guest.far.send(b"x")
            await world.turns()
            assert [guest.calls for guest in guests] == [["ready"], ["ready", "reset"], ["ready"]]
            guests[0].far.send(b"y")
            await world.turns()
            assert guests[0].calls == ["ready", "ready"]
            guests[0].close()
            guests[2].close()

        run(test, faults=1)

    def test_a_flush_that_raises_too(self) -> None:
        async def test(world: World) -> None:
            good, bad = Guest(world), Guest(world, trouble=ValueError("a defect"))
            world.reactor.wake(bad)
            world.reactor.wake(good)
            await world.turns()
            assert bad.calls == ["flush", "reset"]
            assert good.calls == ["flush"]
            good.close()

        run(test, faults=1)

    def test_so_does_what_was_put_off(self) -> None:
        async def test(world: World) -> None:
            bad = Guest(world, trouble=ValueError("a defect"))
            world.reactor.call_soon(bad.flush)
            await world.turns()
            assert bad.calls == ["flush", "reset"]

        run(test, faults=1)

    def test_an_owner_that_cannot_even_be_reset(self) -> None:
        async def test(world: World) -> None:
            class Worse(Guest):
                def reset(self) -> None:
                    super().reset()
                    raise OSError("this as well")

            bad, good = Worse(world, trouble=ValueError("a defect")), Guest(world)
            bad.far.send(b"x")
            good.far.send(b"x")
            await world.turns()
            assert bad.calls == ["ready", "reset"]
            assert good.calls == ["ready"]
            good.close()

        run(test, faults=1)

    def test_the_worker_flushes_on_after_a_fault(self) -> None:
        async def test(world: World) -> None:
            bad, good = Guest(world, trouble=ValueError("a defect")), Guest(world)
            bad.far.send(b"x")
            await world.turns()
            world.reactor.wake(good)
            await world.turns()
            assert good.calls == ["flush"]
            good.close()

        run(test, faults=1)


class TestFlushing:
    def test_comes_after_all_handlers_of_the_batch(self) -> None:
        async def test(world: World) -> None:
            order: list[str] = []

            class Waking(Guest):
                def on_ready(self, events: int) -> None:
                    self.near.recv(100)
                    order.append(f"ready {self.name}")
                    world.reactor.wake(self)

                def flush(self) -> None:
                    order.append(f"flush {self.name}")

            guests = [Waking(world, name) for name in "abc"]
            for guest in guests:
                guest.far.send(b"x")
            await world.turns()
            assert sorted(order[:3]) == ["ready a", "ready b", "ready c"]
            assert order[3:] == [each.replace("ready", "flush") for each in order[:3]]
            for guest in guests:
                guest.close()

        run(test)

    def test_what_is_woken_by_a_flush_is_flushed_in_the_same_batch(self) -> None:
        async def test(world: World) -> None:
            class Chain(Guest):
                def on_ready(self, events: int) -> None:
                    super().on_ready(events)
                    world.reactor.wake(self)

                def flush(self) -> None:
                    super().flush()
                    world.reactor.wake(last)

            first, last = Chain(world), Guest(world)
            first.far.send(b"x")
            await world.until(lambda: first.calls)
            assert last.calls == ["flush"]  # no turn of the loop in between
            first.close()
            last.close()

        run(test)

    def test_outside_of_a_batch_it_comes_soon_and_once(self) -> None:
        async def test(world: World) -> None:
            guest = Guest(world)
            world.reactor.wake(guest)
            assert guest.calls == []
            await world.turns()
            assert guest.calls == ["flush"]
            await world.turns()
            assert guest.calls == ["flush"]
            guest.close()

        run(test)

    def test_who_wakes_itself_for_ever_does_not_keep_others_from_being_served(self) -> None:
        class Restless(Guest):
            def flush(self) -> None:
                super().flush()
                if len(self.calls) < 100_000:
                    self.world.reactor.wake(self)

        async def test(world: World) -> None:
            restless, other = Restless(world), Guest(world)
            world.reactor.wake(restless)
            other.far.send(b"x")
            await world.until(lambda: other.calls == ["ready"])
            assert len(restless.calls) < 100_000
            await world.until(lambda: len(restless.calls) == 100_000)
            restless.close()
            other.close()

        run(test)


class TestDescriptors:
    def test_remove_is_idempotent(self) -> None:
        async def test(world: World) -> None:
            guest = Guest(world)
            fd = guest.near.fileno()
            world.reactor.remove(fd)
            world.reactor.remove(fd)
            guest.far.send(b"x")
            await world.turns()
            assert guest.calls == []
            guest.close()

        run(test)

    def test_one_that_was_closed_already_can_be_removed(self) -> None:
        async def test(world: World) -> None:
            guest = Guest(world)
            fd = guest.near.fileno()
            guest.near.close()
            world.reactor.remove(fd)
            guest.far.close()

        run(test)

    def test_what_one_handler_removed_another_does_not_hear_of(self) -> None:
        async def test(world: World) -> None:
            guests: list[Guest] = []

            class Only(Guest):
                def on_ready(self, events: int) -> None:
                    super().on_ready(events)
                    for other in guests:
                        if other is not self:
                            other.close()

            guests += [Only(world), Only(world)]
            for guest in guests:
                guest.far.send(b"x")
            await world.turns()
            assert sorted(map(len, (guests[0].calls, guests[1].calls))) == [0, 1]
            next(guest for guest in guests if guest.calls).close()

        run(test)

    def test_a_handler_may_be_replaced(self) -> None:
        async def test(world: World) -> None:
            guest = Guest(world)
            heard: list[int] = []

            def other(events: int) -> None:
                heard.append(events)
                guest.near.recv(10)

            world.reactor.replace(guest.near.fileno(), other)
            guest.far.send(b"x")
            await world.turns()
            assert (heard, guest.calls) == ([IN & ~0x2000], [])
            guest.close()

        run(test)

    @pytest.mark.parametrize("read_bytes", [1, 100])
    def test_readiness_is_told_again_until_it_is_used_up(self, read_bytes: int) -> None:
        async def test(world: World) -> None:
            class Sipping(Guest):
                def on_ready(self, events: int) -> None:
                    self.calls.append(self.near.recv(read_bytes).decode())

            guest = Sipping(world)
            guest.far.send(b"abcde")
            await world.until(lambda: "".join(guest.calls) == "abcde")
            assert await world.batches_in() == 0
            guest.close()

        run(test)

    def test_the_clock_is_read_once_a_batch(self) -> None:
        async def test(world: World) -> None:
            times: list[float] = []

            class Late(Guest):
                def on_ready(self, events: int) -> None:
                    super().on_ready(events)
                    times.append(world.reactor.now)

            guests = [Late(world), Late(world)]
            for guest in guests:
                guest.far.send(b"x")
            await world.turns()
            assert times[0] == times[1] > 0
            for guest in guests:
                guest.close()

        run(test)

    def test_writability_is_an_event_of_its_own(self) -> None:
        async def test(world: World) -> None:
            guest = Guest(world)
            heard: list[int] = []

            def once(events: int) -> None:
                heard.append(events)
                world.reactor.modify(guest.near.fileno(), IN)

            world.reactor.replace(guest.near.fileno(), once)
            world.reactor.modify(guest.near.fileno(), IN | OUT)
            await world.turns()
            assert heard == [OUT]
            guest.close()

        run(test)
