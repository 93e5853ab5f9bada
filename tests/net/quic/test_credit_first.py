"""Flow control towards a peer: a small window for streams that wait."""

from __future__ import annotations

from expressgateway.net.quic.credit import Credit, varint

WINDOW = 262_144
FIRST = 16_384


def credit(*, is_client: bool = False) -> Credit:
    return Credit(WINDOW, 4 * WINDOW, FIRST, is_client=is_client)


class TestTheFirstWindow:
    def test_is_small_for_streams_that_the_peer_opens(self) -> None:
        assert credit().receive(0, FIRST, False)
        assert not credit().receive(0, FIRST + 1, False)
        assert not credit().receive(2, FIRST + 1, True)
        assert credit().receive(1, WINDOW, False)  # ours
        assert credit(is_client=True).receive(0, WINDOW, False)
        assert not credit(is_client=True).receive(1, FIRST + 1, False)
        assert not credit().reset(0, FIRST + 1)

    def test_is_a_whole_one_as_soon_as_something_was_used(self) -> None:
        one = credit()
        one.receive(0, 100, False)
        assert not one.is_due
        one.consume(0, 100)
        assert one.frames(0.0, 1.0) == b"\x11\x00" + varint(100 + WINDOW)
        assert one.receive(0, WINDOW, False)
        assert not one.receive(0, 1, False)


class TestWhatIsHeld:
    def test_does_not_count_against_the_connection(self) -> None:
        one = credit()
        for number in range(200):
            assert one.receive(number << 2, FIRST, False), number
            one.hold(FIRST)
            one.frames(0.0, 1.0)
        one.hold(-200 * FIRST)
        assert one.receive(800, FIRST, False)  # what was granted stays granted
