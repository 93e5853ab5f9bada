"""When a worker is too large, and how often that may have it replaced."""

from collections.abc import Iterator

from expressgateway.control.ceiling import ROW, Ceiling, Verdict

FINE, OUTGROWN, DUE = Verdict
LIMIT = 100


class Place:
    """A place that is looked at once a second."""

    def __init__(self, pause_s: float = 60.0) -> None:
        self.ceiling = Ceiling(pause_s)
        self.now = 1000.0
        self.pid = 1
        self.born = 0.0

    def replace(self) -> None:
        self.pid += 1
        self.born = self.now

    def look(self, size: int, limit: int = LIMIT) -> Verdict:
        self.now += 1
        return self.ceiling.look(limit, self.pid, size, self.now - self.born, self.now)

    def until_due(self, size: int = 200) -> float:
        """Seconds until it is replaced."""
        began = self.now
        while self.look(size) is not DUE:
            assert self.now - began < 10_000
        took_s = self.now - began
        self.replace()
        return took_s

    def looks(self, *sizes: int) -> Iterator[Verdict]:
        return (self.look(size) for size in sizes)


def test_over_for_a_moment_is_nothing() -> None:
    place = Place()
    assert set(place.looks(*[200, 200, 100] * 10)) == {FINE}


def test_told_of_once_and_due_at_once() -> None:
    place = Place()
    assert list(place.looks(*[200] * ROW)) == [FINE, FINE, OUTGROWN]
    assert list(place.looks(200, 200)) == [DUE, DUE]
    assert place.look(90) is FINE, "it has become smaller by itself"


def test_no_limit() -> None:
    place = Place()
    assert {place.look(10**12, 0) for _ in range(10)} == {FINE}


def test_pauses_grow() -> None:
    place = Place()
    assert place.until_due() == ROW + 1
    for pause_s in (60, 120, 240, 480):
        assert place.until_due() == ROW + pause_s


def test_a_good_life_is_no_failure() -> None:
    place = Place()
    place.until_due()
    for _ in range(600):
        place.look(90)
    assert place.until_due() == ROW + 1


def test_another_limit_begins_anew() -> None:
    place = Place()
    place.until_due()
    place.look(200)
    assert [place.look(200, 150) for _ in range(ROW + 1)] == [FINE, FINE, OUTGROWN, DUE]


def test_who_cannot_be_replaced_waits() -> None:
    place = Place()
    list(place.looks(*[200] * ROW))
    assert place.look(200) is DUE
    place.ceiling.put_off(place.now)
    assert place.ceiling.wait_s(place.now) == 60
    assert {place.look(200) for _ in range(59)} == {FINE}
    assert place.look(200) is DUE
