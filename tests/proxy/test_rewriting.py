"""Rewrites, header edits and answers of a route's own."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from expressgateway.config.matches import HOP_BY_HOP
from expressgateway.config.routes import _PLACEHOLDERS, FORWARDING
from expressgateway.proxy.forwarding import OURS
from expressgateway.proxy.paths import PathError, normalise
from expressgateway.proxy.rewriting import HeaderEdits, Redirect, Respond, Rewrite
from expressgateway.wire.h1.fields import KINDS
from expressgateway.wire.head import Fields, RequestHead, SharedFields


class TestRewrite:
    @pytest.mark.parametrize(
        ("keys", "target", "expected"),
        [
            ({"strip_prefix": "/api"}, b"/api/x?a=/b", b"/x?a=/b"),
            ({"strip_prefix": "/api"}, b"/api", b"/"),
            ({"strip_prefix": "/api"}, b"/api?", b"/?"),
            ({"strip_prefix": "/api"}, b"/api/", b"/"),
            ({"strip_prefix": "/api"}, b"/apix", b"/apix"),
            ({"strip_prefix": "/api"}, b"/x/api", b"/x/api"),
            ({"strip_prefix": "/api"}, b"/api//x", b"//x"),
            ({"strip_prefix": "/api"}, b"/api/%2f%7e%C3", b"/%2f%7e%C3"),
            ({"strip_prefix": "/api/"}, b"/api/x", b"/x"),
            ({"strip_prefix": "/api/"}, b"/api/", b"/"),
            ({"strip_prefix": "/api/"}, b"/api", b"/api"),
            # Only the normalised form begins with the prefix.
            ({"strip_prefix": "/api"}, b"/%61pi/%7e%c3?%7e", b"/~%C3?%7e"),
            ({"strip_prefix": "/a%2Fb"}, b"/a%2fb/x", b"/x"),
            # Dot segments: what is left must not climb.
            ({"strip_prefix": "/api"}, b"/x/../api/y", b"/y"),
            ({"strip_prefix": "/api"}, b"/api/../y", b"/y"),
            ({"strip_prefix": "/api"}, b"/api/%2E%2e/y", b"/y"),
            ({"strip_prefix": "/api"}, b"/api/../api/y/.", b"/y/"),
            ({"strip_prefix": "/api"}, b"/api/.well-known/%7e", b"/.well-known/%7e"),
            ({"add_prefix": "/v1"}, b"/x?y", b"/v1/x?y"),
            ({"add_prefix": "/v1/"}, b"/", b"/v1/"),
            ({"add_prefix": "/v1"}, b"/%7e/x", b"/v1/%7e/x"),
            ({"add_prefix": "/v1"}, b"/x/../y", b"/v1/y"),
            ({"strip_prefix": "/a", "add_prefix": "/b"}, b"/a/x", b"/b/x"),
            ({"strip_prefix": "/a", "add_prefix": "/b"}, b"/a", b"/b/"),
            ({"strip_prefix": "/a", "add_prefix": "/b"}, b"/c", b"/b/c"),
            ({"path": "/new"}, b"/old?q=1", b"/new?q=1"),
            ({"path": "/new"}, b"/old", b"/new"),
            ({"host": "b.example"}, b"/a/../b", b"/a/../b"),
            ({"strip_prefix": "/a", "add_prefix": "/b"}, b"*", b"*"),
            ({"path": "/new"}, b"*", b"*"),
        ],
    )
    def test_of_a_target(self, keys: dict[str, str], target: bytes, expected: bytes) -> None:
        assert Rewrite(**keys).target(target, normalise(target)) == expected

    def test_of_a_host(self) -> None:
        assert Rewrite(host="B.Example:81").host == b"b.example:81"
        assert Rewrite(path="/x").host is None

    @given(
        st.lists(st.sampled_from(["api", "a", "..", ".", "", "%2e", "%2E.", "%61pi", "%2f"]), max_size=6),
        st.sampled_from([None, "/api", "/api/", "/a"]),
        st.sampled_from([None, "/v1", "/v1/"]),
    )
    @example(["api", "..", "api", "..", "a"], "/api", "/v1")
    def test_never_leaves_the_prefix_it_added(
        self, segments: list[str], strip: str | None, add: str | None
    ) -> None:
        target = b"/" + "/".join(segments).encode() + b"?q"
        try:
            path = normalise(target)
        except PathError:
            return  # refused before anything is rewritten
        made = Rewrite(strip_prefix=strip, add_prefix=add).target(target, path)
        assert made.endswith(b"?q")
        assert normalise(made).startswith((add or "").rstrip("/").encode() + b"/")  # and it does not climb


class TestHeaderEdits:
    FIELDS: Fields = ((b"a", b"1"), (b"b", b"2"), (b"a", b"3"), (b"c", b"4"))

    def test_remove_set_and_add_in_this_order(self) -> None:
        edits = HeaderEdits(set={"B": "x"}, add={"a": "y", "C": "z"}, remove=["A"])
        assert edits.fields(self.FIELDS) == ((b"c", b"4"), (b"b", b"x"), (b"a", b"y"), (b"c", b"z"))
        assert edits.shared(SharedFields(self.FIELDS)).fields == edits.fields(self.FIELDS)

    def test_the_same_object_gives_the_same_object(self) -> None:
        edits = HeaderEdits(set={"b": "x"})
        assert edits.fields(self.FIELDS) is edits.fields(self.FIELDS)
        shared = SharedFields(self.FIELDS)
        assert edits.shared(shared) is edits.shared(shared)
        assert edits.fields((*self.FIELDS,)) == edits.fields(self.FIELDS)

    @pytest.mark.parametrize("name", [b"cookie", b"authorization", b"set-cookie"])
    def test_secrets_are_not_remembered(self, name: bytes) -> None:
        edits = HeaderEdits(remove=["b"])
        fields = ((name, b"secret"), (b"b", b"1"))
        assert edits.fields(fields) == edits.shared(SharedFields(fields)).fields == ((name, b"secret"),)
        assert not edits._kept
        assert not edits._kept_shared

    def test_memory_is_bounded(self) -> None:
        edits = HeaderEdits(set={"b": "x"})
        for number in range(1000):
            fields = ((b"a", b"%d" % number),)
            assert (
                edits.fields(fields) == edits.shared(SharedFields(fields)).fields == (*fields, (b"b", b"x"))
            )
        assert len(edits._kept) <= 32
        assert len(edits._kept_shared) <= 32
        edits._kept.clear()
        assert edits.fields(((b"a", b"x" * 4000),))[1] == (b"b", b"x")
        assert not edits._kept


def request(target: bytes = b"/p/%41?q=1", host: bytes = b"A.example:8080") -> RequestHead:
    return RequestHead(b"GET", b"http", host, target, ())


class TestRedirect:
    @pytest.mark.parametrize(
        ("to", "head", "location"),
        [
            ("/new", request(), b"/new"),
            ("https://{host}{path}{query}", request(), b"https://A.example/p/%41?q=1"),
            ("{scheme}://{host}:81{path}", request(), b"http://A.example:81/p/%41"),
            ("https://{host}{path}", request(host=b"[::1]:80"), b"https://[::1]/p/%41"),
            ("https://{host}{path}", request(host=b"[::1]"), b"https://[::1]/p/%41"),
            ("/x{path}{query}", request(b"/p"), b"/x/p"),
            ("/x{path}{query}", request(b"/p?"), b"/x/p?"),
            ("https://b.example{path}", request(b"*"), b"https://b.example/"),
            ("https://b.example{path}", request(b"//c.example"), b"https://b.example//c.example"),
            # The client's path never names a host.
            ("{path}", request(b"//evil.example/x//y"), b"/evil.example/x//y"),
            ("{path}", request(b"/\\evil.example"), b"/evil.example"),
            ("https:{path}", request(b"///evil.example"), b"https:/evil.example"),
            ("/{path}", request(b"//evil.example"), b"/evil.example"),
            ("/{query}{path}", request(b"//evil.example"), b"/evil.example"),
        ],
    )
    def test_location(self, to: str, head: RequestHead, location: bytes) -> None:
        assert Redirect(to, 308).answer(head) == (308, ((b"location", location),), b"")

    def test_without_a_host_there_is_no_place_to_go(self) -> None:
        assert Redirect("https://{host}{path}").answer(request(host=b"")) is None
        assert Redirect("https://a.example{path}").answer(request(host=b"")) is not None

    def test_unknown_placeholders_are_refused(self) -> None:
        with pytest.raises(ValueError, match="no such placeholder: hostname"):
            Redirect("https://{hostname}{path}")


def test_respond() -> None:
    text = Respond(404, "nö", "text/plain").answer(request())
    assert text == (404, ((b"content-type", b"text/plain"),), "nö".encode())
    assert Respond(204).answer(request()) == (204, (), b"")


class TestAgreement:
    """What the configuration refuses is what others own."""

    def test_on_hop_by_hop_fields(self) -> None:
        assert {name.encode() for name in HOP_BY_HOP} | {b"host", b"expect"} == set(KINDS)

    def test_on_fields_of_the_gateway(self) -> None:
        assert {name.encode() for name in FORWARDING} == OURS

    def test_on_placeholders(self) -> None:
        assert Redirect("".join(_PLACEHOLDERS)).answer(request(b"/x?y")) == (
            302,
            ((b"location", b"httpA.example/x?y"),),
            b"",
        )
