"""The fields that a gateway adds, replaces and removes: four modes, trusted proxies and everybody else."""

import re

import pytest

from expressgateway.proxy.forwarding import Forwarding, Peer, TrustedProxies
from expressgateway.proxy.trace_context import Ids
from expressgateway.wire.head import Field, RequestHead, ResponseHead

SENT: tuple[Field, ...] = (
    (b"x-before", b"1"),
    (b"x-forwarded-for", b"203.0.113.9"),
    (b"x-forwarded-for", b"198.51.100.7"),
    (b"x-forwarded-proto", b"https"),
    (b"x-forwarded-host", b"public.example"),
    (b"forwarded", b"for=203.0.113.9;proto=https"),
    (b"via", b"1.0 first"),
    (b"via", b"2 second"),
    (b"x-request-id", b"theirs"),
    (b"x-after", b"2"),
)


def rules(forwarded: str = "x-forwarded", via: bool = True, alt_svc: str | None = None) -> Forwarding:
    return Forwarding(forwarded=forwarded, via=via, server_header="gw", alt_svc=alt_svc, ids=Ids())


def peer(trusted: bool = False, ip: str = "192.0.2.1") -> Peer:
    return Peer(ip, trusted, b"http")


def sent(by: Forwarding, who: Peer, fields: tuple[Field, ...] = SENT, **more: object) -> list[Field]:
    head = RequestHead(b"GET", b"http", str(more.get("authority", "a.example")).encode(), b"/", fields)
    request_id = by.request(head, who)
    given = [*head.shared.fields, *head.headers]
    assert (b"x-request-id", request_id) in given
    return given


def all_of(fields: list[Field], *names: bytes) -> list[Field]:
    return [field for field in fields if field[0] in names]


FORWARDING = (b"x-forwarded-for", b"x-forwarded-proto", b"x-forwarded-host", b"forwarded")
OWN_X = [
    (b"x-forwarded-for", b"192.0.2.1"),
    (b"x-forwarded-proto", b"http"),
    (b"x-forwarded-host", b"a.example"),
]
CHAIN_X = [
    (b"x-forwarded-for", b"203.0.113.9, 198.51.100.7, 192.0.2.1"),
    (b"x-forwarded-proto", b"https"),
    (b"x-forwarded-host", b"public.example"),
]
OWN_F = [(b"forwarded", b'for=192.0.2.1;proto=http;host="a.example"')]
CHAIN_F = [(b"forwarded", b'for=203.0.113.9;proto=https, for=192.0.2.1;proto=http;host="a.example"')]


@pytest.mark.parametrize(
    ("mode", "trusted", "expected"),
    [
        ("x-forwarded", False, OWN_X),
        ("x-forwarded", True, CHAIN_X),
        ("forwarded", False, OWN_F),
        ("forwarded", True, CHAIN_F),
        ("both", False, OWN_X + OWN_F),
        ("both", True, CHAIN_X + CHAIN_F),
        ("none", False, []),
        ("none", True, [field for field in SENT if field[0] in FORWARDING]),
    ],
)
def test_four_modes(mode: str, trusted: bool, expected: list[Field]) -> None:
    who = peer(trusted)
    by = rules(mode)
    first = sent(by, who)
    assert all_of(first, *FORWARDING) == expected
    assert all_of(first, b"x-before", b"x-after") == [(b"x-before", b"1"), (b"x-after", b"2")]
    assert all_of(sent(by, who), *FORWARDING) == expected, "the second time, from memory"


def test_nothing_to_forward() -> None:
    assert all_of(sent(rules("both"), peer(), ()), *FORWARDING) == OWN_X + OWN_F
    given = sent(rules("both"), peer(), (), authority="")
    assert all_of(given, b"x-forwarded-host") == []
    assert all_of(given, b"forwarded") == [(b"forwarded", b"for=192.0.2.1;proto=http")]


def test_ipv6_is_quoted_in_forwarded_only() -> None:
    given = sent(rules("both"), peer(ip="2001:db8::1"), ())
    assert all_of(given, b"x-forwarded-for") == [(b"x-forwarded-for", b"2001:db8::1")]
    assert all_of(given, b"forwarded") == [(b"forwarded", b'for="[2001:db8::1]";proto=http;host="a.example"')]


class TestVia:
    """RFC 9110 7.6.3."""

    @pytest.mark.parametrize("trusted", [True, False])
    def test_appended(self, trusted: bool) -> None:
        assert all_of(sent(rules(), peer(trusted)), b"via") == [(b"via", b"1.0 first, 2 second, 1.1 gw")]
        assert all_of(sent(rules(), peer(), ()), b"via") == [(b"via", b"1.1 gw")]

    def test_off(self) -> None:
        assert all_of(sent(rules(via=False), peer()), b"via") == [(b"via", b"1.0 first, 2 second")]
        assert all_of(sent(rules(via=False), peer(), ()), b"via") == []

    def test_the_version_is_the_senders(self) -> None:
        by, who = rules(), peer()
        for version in (b"1.0", b"1.1", b"2"):
            head = RequestHead(b"GET", b"http", b"a", b"/", (), version=version)
            by.request(head, who)
            assert (b"via", version + b" gw") in head.shared.fields


class TestRequestId:
    def test_kept_from_a_trusted_peer_only(self) -> None:
        assert all_of(sent(rules(), peer(True)), b"x-request-id") == [(b"x-request-id", b"theirs")]
        made = all_of(sent(rules(), peer(False)), b"x-request-id")
        assert len(made) == 1
        assert made[0][1] != b"theirs"

    def test_unique(self) -> None:
        by, who = rules(), peer()
        assert len({all_of(sent(by, who), b"x-request-id")[0] for _ in range(1000)}) == 1000
        assert Ids().request_id(b"1") != Ids().request_id(b"1")

    @pytest.mark.parametrize("value", [b"", b"a b", b"\xff", b"x" * 201])
    def test_one_that_is_not_fit(self, value: bytes) -> None:
        given = all_of(sent(rules(), peer(True), ((b"x-request-id", value),)), b"x-request-id")
        assert len(given) == 1
        assert given[0][1] != value


class TestTraceparent:
    """W3C Trace Context 3.2."""

    GOOD = b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"

    @pytest.mark.parametrize("trusted", [True, False])
    def test_continued(self, trusted: bool) -> None:
        fields = ((b"traceparent", self.GOOD), (b"tracestate", b"a=1"))
        given = sent(rules(), peer(trusted), fields)
        assert all_of(given, b"traceparent", b"tracestate") == [
            (b"tracestate", b"a=1"),
            (b"traceparent", self.GOOD),
        ]

    def test_begun(self) -> None:
        by, who = rules(), peer()
        values = {all_of(sent(by, who, ()), b"traceparent")[0][1] for _ in range(100)}
        assert len(values) == 100
        for value in values:
            match = re.fullmatch(rb"00-([0-9a-f]{32})-([0-9a-f]{16})-00", value)
            assert match
            assert match[1].strip(b"0")
            assert match[2].strip(b"0")

    @pytest.mark.parametrize(
        "value",
        [
            b"",
            b"x",
            GOOD.upper(),
            GOOD + b"-more",
            b"ff" + GOOD[2:],
            b"00-" + b"0" * 32 + b"-00f067aa0ba902b7-01",
            b"00-4bf92f3577b34da6a3ce929d0e0e4736-" + b"0" * 16 + b"-01",
        ],
    )
    def test_a_bad_one_begins_another(self, value: bytes) -> None:
        given = sent(rules(), peer(), ((b"traceparent", value), (b"tracestate", b"a=1")))
        made = all_of(given, b"traceparent")
        assert len(made) == 1
        assert made[0][1] != value
        # 3.2.2.1: who failed to parse traceparent must not parse tracestate; 4.3: and does not send it on.
        assert all_of(given, b"tracestate") == [], "the state of a trace that was given up"


class TestMemory:
    """What is kept on the peer belongs to one header section, authority, version and set of rules."""

    def test_another_authority(self) -> None:
        by, who = rules(), peer()
        for authority in ("a.example", "b.example", "a.example"):
            given = sent(by, who, (), authority=authority)
            assert all_of(given, b"x-forwarded-host") == [(b"x-forwarded-host", authority.encode())]

    def test_another_section(self) -> None:
        by, who = rules(), peer()
        for value in (b"1", b"2", b"1"):
            assert all_of(sent(by, who, ((b"x", value),)), b"x") == [(b"x", value)]

    def test_other_rules(self) -> None:
        who = peer()
        assert all_of(sent(rules("both"), who), *FORWARDING) == OWN_X + OWN_F
        assert all_of(sent(rules("none"), who), *FORWARDING) == []

    def test_a_trace_is_not_kept_for_the_next_request(self) -> None:
        by, who = rules(), peer(True)
        sent(by, who, ((b"traceparent", TestTraceparent.GOOD), (b"x-request-id", b"theirs")))
        given = sent(by, who, ((b"x", b"y"),))
        assert all_of(given, b"traceparent")[0][1] != TestTraceparent.GOOD
        assert all_of(given, b"x-request-id")[0][1] != b"theirs"


class TestResponses:
    WALL_S = 1_700_000_000

    def fields(
        self, by: Forwarding, *fields: Field, wall_s: int = WALL_S, version: bytes = b"1.1"
    ) -> list[Field]:
        head = ResponseHead(200, fields, None, version)
        by.response(head, wall_s)
        return [*head.shared.fields, *head.headers]

    def test_added(self) -> None:
        assert self.fields(rules(), (b"x", b"1"), (b"x", b"2")) == [
            (b"x", b"1"),
            (b"x", b"2"),
            (b"date", b"Tue, 14 Nov 2023 22:13:20 GMT"),
            (b"server", b"gw"),
            (b"via", b"1.1 gw"),
        ]

    def test_the_backends_own_stay(self) -> None:
        mine = ((b"date", b"then"), (b"server", b"nginx"), (b"alt-svc", b"h3=':1'"))
        assert self.fields(rules(via=False), *mine) == list(mine)

    def test_via_is_appended(self) -> None:
        given = self.fields(rules(), (b"via", b"1.0 a"), (b"via", b"1.1 b"), version=b"1.0")
        assert all_of(given, b"via") == [(b"via", b"1.0 a, 1.1 b, 1.0 gw")]

    def test_alt_svc_is_replaced(self) -> None:
        given = self.fields(rules(alt_svc='h3=":443"'), (b"alt-svc", b'h3=":1"'), (b"alt-svc", b"clear"))
        assert all_of(given, b"alt-svc") == [(b"alt-svc", b'h3=":443"')]

    def test_date_goes_on(self) -> None:
        """Also for a section that is remembered."""
        by = rules()
        fields = ((b"x", b"1"),)
        dates = []
        for second in (0, 0, 1, 1, 2):
            head = ResponseHead(200, fields)
            by.response(head, self.WALL_S + second)
            dates.append(dict(head.shared.fields)[b"date"][-6:-4])
        assert dates == [b"20", b"20", b"21", b"21", b"22"]

    def test_remembered_sections_are_not_mixed_up(self) -> None:
        by = rules()
        sections = [((b"n", b"%d" % number),) for number in range(300)]
        for _ in range(2):
            for section in sections:
                head = ResponseHead(200, section)
                by.response(head, self.WALL_S)
                assert all_of([*head.shared.fields], b"n") == list(section)
        for version in (b"1.0", b"1.1"):
            head = ResponseHead(200, sections[0], None, version)
            by.response(head, self.WALL_S)
            assert dict(head.shared.fields)[b"via"] == version + b" gw"

    def test_no_tuple_takes_the_place_of_another(self) -> None:
        """Sections that die and are born: an id alone would be taken for the one before."""
        by = rules()
        for number in range(2000):
            value = b"%d" % number
            head = ResponseHead(200, tuple((b"n", each) for each in [value]))
            by.response(head, self.WALL_S)
            assert dict(head.shared.fields)[b"n"] == value
            if number % 3 == 0:
                secret = ResponseHead(200, ((b"set-cookie", value),))
                by.response(secret, self.WALL_S)
                assert dict(secret.shared.fields)[b"set-cookie"] == value


class TestTrustedProxies:
    def test_networks(self) -> None:
        trusted = TrustedProxies(["10.0.0.0/8", "2001:db8::/32"])
        for ip in ("10.1.2.3", "::ffff:10.1.2.3", "2001:db8::1"):
            assert ip in trusted
        for ip in ("11.1.2.3", "::ffff:11.1.2.3", "2001:db9::1", "fe80::1%eth0", "", "x"):
            assert ip not in trusted
        assert "127.0.0.1" not in TrustedProxies([])
