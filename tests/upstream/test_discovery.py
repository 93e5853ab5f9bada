"""From settings and answers to backends: ids that last, weights that hold."""

from __future__ import annotations

import json

import pytest

from expressgateway.upstream.backend import BackendSettings
from expressgateway.upstream.discovery import (
    Endpoint,
    expand,
    is_literal,
    key_of,
    names_of,
    read_answers,
    socket_address,
    srv_name,
)

SERVICE = "_http._tcp.example"


def settings(host: str, port: int = 80, id_: str = "", weight: int = 1) -> BackendSettings:
    return BackendSettings(
        id=id_ or f"id-{host}", host=host, port=port, protocol="h1", weight=weight, tls=None, send_proxy=None
    )


def service(weight: int = 1) -> BackendSettings:
    return settings(SERVICE, 0, "s", weight)


class TestExpand:
    def test_a_literal_is_one_backend_and_needs_no_answer(self) -> None:
        four, six = settings("192.0.2.1"), settings("2001:db8::1")
        assert expand([four, six], {}) == [
            (four, ("192.0.2.1", 80), "id-192.0.2.1"),
            (six, ("2001:db8::1", 80, 0, 0), "id-2001:db8::1"),
        ]

    def test_a_name_is_one_backend_per_address(self) -> None:
        web = settings("web", id_="w", weight=7)
        answers = {"web": (Endpoint("192.0.2.1"), Endpoint("2001:db8::1")), "other": (Endpoint("192.0.2.9"),)}
        assert expand([web], answers) == [
            (web, ("192.0.2.1", 80), "w#192.0.2.1"),
            (web, ("2001:db8::1", 80, 0, 0), "w#2001:db8::1"),
        ]

    @pytest.mark.parametrize("answers", [{}, {"web": ()}, {"srv:web": (Endpoint("192.0.2.1", 1, 1),)}])
    def test_a_name_without_an_answer_is_none(self, answers: dict[str, tuple[Endpoint, ...]]) -> None:
        assert expand([settings("web")], answers) == []

    def test_a_service_has_ports_and_weights_of_its_own(self) -> None:
        records = (Endpoint("192.0.2.1", 8080, 10), Endpoint("192.0.2.1", 8081, 0), Endpoint("::1", 1, 1))
        found = expand([service(weight=3)], {f"srv:{SERVICE}": records})
        assert [(each.weight, address, id_) for each, address, id_ in found] == [
            (30, ("192.0.2.1", 8080), "s#192.0.2.1:8080"),
            (3, ("192.0.2.1", 8081), "s#192.0.2.1:8081"),
            (3, ("::1", 1, 0, 0), "s#::1:1"),
        ]

    @pytest.mark.parametrize(
        ("configured", "record", "weight"),
        [(0, 500, 0), (1, 0, 1), (1, 65535, 65535), (2, 65535, 65535), (65535, 65535, 65535), (0, 0, 0)],
    )
    def test_weights_multiply_and_end_somewhere(self, configured: int, record: int, weight: int) -> None:
        answers = {f"srv:{SERVICE}": (Endpoint("192.0.2.1", 80, record),)}
        ((found, _, _),) = expand([service(weight=configured)], answers)
        assert found.weight == weight

    def test_of_ids_given_twice_the_first_one_wins(self) -> None:
        first, second = settings("192.0.2.1", id_="x"), settings("192.0.2.2", id_="x")
        web, again = settings("web", id_="w", weight=1), settings("web", id_="w", weight=2)
        both = (Endpoint("192.0.2.3"), Endpoint("192.0.2.3"))
        twice = (Endpoint("192.0.2.4", 80, 5), Endpoint("192.0.2.4", 80, 6))
        found = expand([first, second, web, again, service()], {"web": both, f"srv:{SERVICE}": twice})
        assert [(each.weight, id_) for each, _, id_ in found] == [
            (1, "x"),
            (1, "w#192.0.2.3"),
            (5, "s#192.0.2.4:80"),
        ]
        assert found[0][0] is first

    def test_another_order_gives_the_same_ids(self) -> None:
        web = settings("web", id_="w")
        one, other = Endpoint("192.0.2.1"), Endpoint("192.0.2.2")
        ids = [{id_ for _, _, id_ in expand([web], {"web": each})} for each in ((one, other), (other, one))]
        assert ids[0] == ids[1]


def test_names_are_keys_each_once() -> None:
    every = [settings("web"), settings("192.0.2.1"), settings("web", 81), service(), settings(SERVICE, 80)]
    assert names_of(every) == ["web", f"srv:{SERVICE}", SERVICE]
    assert key_of(every[1]) is None
    assert [srv_name(key) for key in names_of(every)] == [None, SERVICE, None]


def test_answers_come_through_json() -> None:
    answers = {"web": (Endpoint("192.0.2.1"),), "srv:s": (Endpoint("::1", 80, 5),), "none": ()}
    assert read_answers(json.loads(json.dumps(answers))) == answers
    assert isinstance(read_answers({"web": [["::1", 1, 2]]})["web"][0], Endpoint)


@pytest.mark.parametrize(
    ("host", "is_one"), [("192.0.2.1", True), ("::1", True), ("web", False), ("1.2.3", False), ("a.b", False)]
)
def test_what_a_literal_is(host: str, is_one: bool) -> None:
    assert is_literal(host) is is_one


def test_socket_addresses() -> None:
    assert socket_address("192.0.2.1", 1) == ("192.0.2.1", 1)
    assert socket_address("::1", 1) == ("::1", 1, 0, 0)
