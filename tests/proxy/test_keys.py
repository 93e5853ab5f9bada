"""Keys: what a request is hashed by, and whom of a chain of proxies to believe."""

from itertools import product

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from expressgateway.proxy.forwarding import Peer, TrustedProxies
from expressgateway.proxy.keys import ClientIp, cookie_value, key_of
from expressgateway.wire.head import Fields, RequestHead

TRUSTED = TrustedProxies(["10.0.0.0/8", "fd00::/8"])
STRANGER = Peer("192.0.2.9", False, b"http")
PROXY = Peer("10.0.0.1", True, b"http")


def request(*fields: tuple[str, str], target: bytes = b"/", host: bytes = b"a.example") -> RequestHead:
    made: Fields = tuple((name.encode(), value.encode("latin-1")) for name, value in fields)
    return RequestHead(b"GET", b"http", host, target, made)


def key(spec: str, head: RequestHead, peer: Peer = STRANGER) -> bytes | None:
    return key_of(spec, TRUSTED)(head, peer)


def test_a_field() -> None:
    head = request(("x-user", "jim"), ("x-list", "a"), ("x-list", "b"), ("x-empty", ""))
    assert key("header:X-User", head) == b"jim"
    assert key("header:x-list", head) == b"a, b"
    assert key("header:x-empty", head) is None
    assert key("header:x-none", head) is None


def test_the_host_is_a_field() -> None:
    assert key("header:Host", request(host=b"b.example:80")) == b"b.example:80"
    assert key("header:host", request(host=b"")) is None


def test_the_path_is_the_normalised_one() -> None:
    assert key("path", request(target=b"/a/../%62?x")) == b"/b"
    assert key("path", request(target=b"/%zz")) is None


@pytest.mark.parametrize("spec", ["", "client", "header", "header:", "cookie:", "path:x", "client_ip:x"])
def test_there_are_no_others(spec: str) -> None:
    with pytest.raises(ValueError, match="no such key"):
        key_of(spec, TRUSTED)


class TestCookies:
    @pytest.mark.parametrize(
        ("line", "value"),
        [
            ("s=1", "1"),
            ("a=b; s=1", "1"),
            ("a=b;s=1", "1"),
            ("a=b;\t s=1;c=d", "1"),
            (" s=1", "1"),
            ("s=1; s=2", "1"),
            ("s=1 ; x=y", "1"),
            ('s="1 2"; x=y', "1 2"),
            ('s="', '"'),
            ('s=""', ""),
            ("s=", ""),
            ("s=a=b==", "a=b=="),
            ("xs=1; s=2", "2"),
            ("x=s=1; s=2", "2"),
            ("x s=1; s=2", "2"),
            ("=s=1", None),
            ("S=1", None),
            ("s", None),
            ("s =1", None),
            ("", None),
            (";;;", None),
            ("xs=1; " * 70 + "s=1", None),
        ],
    )
    def test_the_first_of_that_name(self, line: str, value: str | None) -> None:
        head = request(("cookie", line))
        assert cookie_value(head, b"s") == (value.encode() if value is not None else None)
        assert key("cookie:s", head) == (value.encode() if value else None)

    def test_over_several_lines(self) -> None:
        head = request(
            ("cookie", "a=1"), ("x", "s=0"), ("cookie", "xs=1"), ("cookie", "s=2"), ("cookie", "s=3")
        )
        assert key("cookie:s", head) == b"2"
        assert key("cookie:b", head) is None

    @given(st.lists(st.tuples(st.sampled_from("ab"), st.text("ab=1", max_size=4)), max_size=8))
    def test_what_clients_send_is_read_as_servers_do(self, cookies: list[tuple[str, str]]) -> None:
        first: dict[str, str] = {}
        for name, value in cookies:
            first.setdefault(name, value)
        head = request(("cookie", "; ".join(f"{name}={value}" for name, value in cookies)))
        for name in "ab":
            found = cookie_value(head, name.encode())
            assert found == (first[name].encode() if name in first else None)

    @given(st.text(' \t;="sx', max_size=40))
    def test_whatever_comes_is_read_without_an_error(self, line: str) -> None:
        value = cookie_value(request(("cookie", line)), b"s")
        assert value is None or b";" not in value


class TestClientIp:
    @pytest.mark.parametrize(
        ("chain", "ip"),
        [
            ("192.0.2.1", "192.0.2.1"),
            ("192.0.2.1, 198.51.100.1", "198.51.100.1"),
            ("192.0.2.1,198.51.100.1 ,10.9.9.9, 10.0.0.2", "198.51.100.1"),
            ("10.0.0.3, 10.0.0.2", "10.0.0.3"),
            ("192.0.2.1:1234", "192.0.2.1"),
            ("2001:DB8:0::1", "2001:db8::1"),
            ("[2001:db8::1]:443", "2001:db8::1"),
            ("::ffff:192.0.2.1", "192.0.2.1"),
            ("192.0.2.1, fd00::1", "192.0.2.1"),
            ("192.0.2.1, ::ffff:10.0.0.2", "192.0.2.1"),
            ("192.0.2.1, nonsense, 10.0.0.2", "10.0.0.2"),
            ("192.0.2.1, nonsense", "10.0.0.1"),
            ("192.0.2.1, , 10.0.0.2", "10.0.0.2"),
            ("fe80::1%eth0", "10.0.0.1"),
            ("٣.1.1.1".encode().decode("latin-1"), "10.0.0.1"),
            ("unknown", "10.0.0.1"),
            ("", "10.0.0.1"),
            ("6.6.6.6, " + "10.0.0.7, " * 40 + "10.0.0.2", "10.0.0.7"),
        ],
    )
    def test_of_a_trusted_proxys_chain(self, chain: str, ip: str) -> None:
        resolve = ClientIp(TRUSTED)
        for _ in range(2):  # from memory, the second time
            assert resolve(request(("x-forwarded-for", chain)), PROXY) == ip.encode()

    def test_of_a_stranger_is_its_own_whatever_it_says(self) -> None:
        head = request(("x-forwarded-for", "198.51.100.1"), ("forwarded", "for=198.51.100.1"))
        assert key("client_ip", head) == b"192.0.2.9"

    def test_of_a_proxy_that_says_nothing_is_the_proxys(self) -> None:
        assert key("client_ip", request(), PROXY) == b"10.0.0.1"

    def test_lines_of_a_chain_are_one_list(self) -> None:
        head = request(("x-forwarded-for", "192.0.2.1"), ("a", "b"), ("x-forwarded-for", "10.0.0.2"))
        assert key("client_ip", head, PROXY) == b"192.0.2.1"

    def test_x_forwarded_for_goes_before_forwarded(self) -> None:
        head = request(("forwarded", "for=192.0.2.1"), ("x-forwarded-for", "192.0.2.2"))
        assert key("client_ip", head, PROXY) == b"192.0.2.2"

    @pytest.mark.parametrize(
        ("value", "ip"),
        [
            ("for=192.0.2.1", "192.0.2.1"),
            ("For=192.0.2.1;proto=http, by=x;FOR=10.0.0.2", "192.0.2.1"),
            ('for="[2001:db8::1]:443";host="a"', "2001:db8::1"),
            ('for="192.0.2.1:80" , for=10.0.0.2', "192.0.2.1"),
            ('for="192.0.\\2.1"', "192.0.2.1"),
            # What a client may have put into its Host stands in quotes.
            ('for=192.0.2.1;host="a, for=6.6.6.6"', "192.0.2.1"),
            ('for=192.0.2.1;host="a\\", for=6.6.6.6"', "192.0.2.1"),
            ("for=192.0.2.1, proto=http", "10.0.0.1"),
            ("for=192.0.2.1, for=unknown", "10.0.0.1"),
            ("for=192.0.2.1, for=_hidden, for=10.0.0.2", "10.0.0.2"),
            ('for=192.0.2.1, for="', "10.0.0.1"),
            ("for=[::1]", "10.0.0.1"),
            ("nonsense", "10.0.0.1"),
            ("for=192.0.2.1" + ", for=10.0.0.2" * 400, "10.0.0.1"),
            ("for=192.0.2.1" + ", for=10.0.0.7" * 40 + ", for=10.0.0.2", "10.0.0.7"),
        ],
    )
    def test_of_a_forwarded_field(self, value: str, ip: str) -> None:
        resolve = ClientIp(TRUSTED)
        for _ in range(2):
            assert resolve(request(("forwarded", value)), PROXY) == ip.encode()

    def test_the_same_text_in_the_other_field_is_something_else(self) -> None:
        resolve = ClientIp(TRUSTED)
        assert resolve(request(("x-forwarded-for", "192.0.2.1")), PROXY) == b"192.0.2.1"
        assert resolve(request(("forwarded", "192.0.2.1")), PROXY) == b"10.0.0.1"

    def test_what_is_remembered_is_bounded(self) -> None:
        resolve = ClientIp(TRUSTED)
        for a, b in product(range(20), range(100)):
            resolve(request(("x-forwarded-for", f"192.0.{a}.{b}")), PROXY)
        assert len(resolve._kept) <= 1024
        resolve._kept.clear()
        resolve(request(("x-forwarded-for", "x" * 300)), PROXY)
        assert not resolve._kept

    @given(st.text(' \t,;="\\forFR.:[]1%', max_size=60), st.booleans())
    @example("for=" + " " * 4000 + "!", True)
    @example('for="' + "\\a" * 2000, True)
    def test_whatever_comes_is_an_address(self, value: str, is_rfc: bool) -> None:
        head = request(("forwarded" if is_rfc else "x-forwarded-for", value))
        assert key("client_ip", head, PROXY)
