"""The route table: conversations, the reference that tries every route, and what bounds it."""

from collections.abc import Mapping, Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from expressgateway.proxy.paths import normalise
from expressgateway.proxy.routing import Match, RouteTable, combined, host_of, parameters
from expressgateway.wire.head import Fields, RequestHead


def request(
    target: bytes = b"/", host: bytes = b"a.example", method: bytes = b"GET", fields: Fields = ()
) -> RequestHead:
    return RequestHead(method, b"http", host, target, fields)


def ask(table: RouteTable[str], head: RequestHead) -> str | None:
    return table.find(head, normalise(head.path))


def table_of(**routes: Match) -> RouteTable[str]:
    return RouteTable([(match, name) for name, match in routes.items()])


# -- one kind of condition after the other


class TestHosts:
    TABLE = table_of(
        exact=Match.of(host="a.example"),
        deep=Match.of(host="*.b.example"),
        wild=Match.of(host="*.example"),
        v4=Match.of(host="192.0.2.1"),
        v6=Match.of(host="[2001:db8::1]"),
    )

    @pytest.mark.parametrize(
        ("host", "route"),
        [
            (b"a.example", "exact"),
            (b"A.Example:8080", "exact"),
            (b"a.example.", "exact"),
            (b"a.example.:80", "exact"),
            (b"a.example:", "exact"),
            (b"b.example", "wild"),
            (b"x.a.example", "wild"),
            (b"x.b.example", "deep"),
            (b"x.y.b.example:1", "deep"),
            (b"example", None),
            (b"aexample", None),
            (b".example", None),
            (b"x..b.example", None),
            (b"a.example..", None),
            (b"192.0.2.1:80", "v4"),
            (b"[2001:db8::1]", "v6"),
            (b"[2001:DB8:0:0::1]:443", "v6"),
            (b"[2001:db8::2]", None),
            (b"[", None),
            (b"", None),
            (b"x." * 200 + b"b.example", None),
        ],
    )
    def test_by_what_the_authority_is(self, host: bytes, route: str | None) -> None:
        assert ask(self.TABLE, request(host=host)) == route
        assert ask(self.TABLE, request(host=host)) == route  # from memory

    def test_what_is_no_host_still_gets_the_routes_for_any(self) -> None:
        table = table_of(any=Match(), exact=Match.of(host="a.example"))
        assert ask(table, request(host=b"")) == ask(table, request(host=b"x" * 300)) == "any"

    def test_a_wildcard_does_not_match_where_its_suffix_begins(self) -> None:
        assert ask(table_of(wild=Match.of(host="*.a.example")), request()) is None


class TestPaths:
    TABLE = table_of(
        exact=Match.of(path="/api/v1"),
        api=Match.of(path_prefix="/api"),
        below=Match.of(path_prefix="/files/"),
        files=Match.of(path_prefix="/files"),
        deep=Match.of(path_prefix="/files/a/b"),
        number=Match.of(path_regex="/item/[0-9]+"),
        escaped=Match.of(path_prefix="/a%2Fb"),
        double=Match.of(path_prefix="/c//"),
    )

    @pytest.mark.parametrize(
        ("target", "route"),
        [
            (b"/api", "api"),
            (b"/api/", "api"),
            (b"/api/x", "api"),
            (b"/api?x", "api"),
            (b"/apix", None),
            (b"/ap", None),
            (b"/api/v1", "exact"),
            (b"/api/v1?x=/y", "exact"),
            (b"/api/v1/", "api"),
            (b"/%61pi/%76%31", "exact"),
            (b"/x/../api/v1", "exact"),
            (b"/api/../files/x", "below"),
            (b"/API", None),
            (b"/files", "files"),
            (b"/files/", "below"),
            (b"/files/a", "below"),
            (b"/files/a/bc", "below"),
            (b"/files/a/b", "deep"),
            (b"/files/a/b/c", "deep"),
            (b"/item/12", "number"),
            (b"/item/%31", "number"),
            (b"/item/12/x", None),
            (b"/x/item/12", None),
            (b"/a%2fb/c", "escaped"),
            (b"/a/b", None),
            (b"/c//", "double"),
            (b"/c//x", "double"),
            (b"/c/x", None),
            (b"/", None),
            (b"//api", None),
            (b"*", None),
        ],
    )
    def test_by_what_the_path_is(self, target: bytes, route: str | None) -> None:
        assert ask(self.TABLE, request(target)) == route

    def test_the_slash_is_a_prefix_of_every_path_and_not_of_the_asterisk(self) -> None:
        table = table_of(slash=Match.of(path_prefix="/"), all=Match.of(path_regex=".*"), options=Match())
        assert ask(table, request(b"/x")) == "all"
        assert ask(table, request(b"*", method=b"OPTIONS")) == "options"
        assert ask(table_of(slash=Match.of(path_prefix="/")), request(b"/x")) == "slash"
        assert ask(table_of(slash=Match.of(path_prefix="/")), request(b"*", method=b"OPTIONS")) is None

    def test_an_expression_that_is_longer_goes_first_then_the_one_given_first(self) -> None:
        table = table_of(
            a=Match.of(path_regex="/.*"), b=Match.of(path_regex="/x[x]*"), c=Match.of(path_regex="/x[x]+")
        )
        assert ask(table, request(b"/xx")) == "b"
        assert ask(table, request(b"/y")) == "a"


class TestConditions:
    def test_of_a_field_mean_its_whole_value(self) -> None:
        table = table_of(a=Match.of(headers={"x-a": "1"}), empty=Match.of(headers={"x-a": ""}))
        assert ask(table, request(fields=((b"x-a", b"1"),))) == "a"
        assert ask(table, request(fields=((b"x-a", b""),))) == "empty"
        for fields in ((), ((b"x-a", b"11"),), ((b"x-b", b"1"),), ((b"x-a", b"1"), (b"x-a", b"1"))):
            assert ask(table, request(fields=fields)) is None

    def test_of_a_field_of_several_lines_mean_the_list(self) -> None:
        table = table_of(
            two=Match.of(headers={"x-a": "1, 2"}), cookie=Match.of(headers={"cookie": "a=b; c=d"})
        )
        for fields in (((b"x-a", b"1, 2"),), ((b"x-a", b"1"), (b"y", b"3"), (b"x-a", b"2"))):
            assert ask(table, request(fields=fields)) == "two"
        assert ask(table, request(fields=((b"x-a", b"2"), (b"x-a", b"1")))) is None
        assert ask(table, request(fields=((b"cookie", b"a=b"), (b"cookie", b"c=d")))) == "cookie"

    @pytest.mark.parametrize(
        ("query", "route"),
        [
            (b"v=2", "two"),
            (b"a=b&v=2&c", "two"),
            (b"v=%32", "two"),
            (b"%76=2", "two"),
            (b"v=2&v=3", "two"),
            (b"v=3&v=2", None),
            (b"v=2;w=1", None),
            (b"v", "none"),
            (b"v=", "none"),
            (b"V=2", None),
            (b"n+m=%C3%BC+x", "words"),
            (b"n%20m=%c3%bc%20x", "words"),
            (b"n%2Bm=x", None),
            (b"", None),
            (b"&=&&", None),
        ],
    )
    def test_of_a_parameter_mean_its_first_value_decoded(self, query: bytes, route: str | None) -> None:
        table = table_of(
            two=Match.of(query={"v": "2"}),
            none=Match.of(query={"v": ""}),
            words=Match.of(query={"n m": "ü x"}),
        )
        assert ask(table, request(b"/x?" + query)) == route

    def test_of_a_method_mean_that_method(self) -> None:
        table = table_of(get=Match.of(method="GET"))
        assert ask(table, request()) == "get"
        assert ask(table, request(method=b"HEAD")) is None


class TestTheMostSpecificWins:
    """Each route of the list is more specific than the next, and all match."""

    ORDERED: Sequence[Match] = (
        Match.of(host="a.b.example"),
        Match.of(host="*.b.example", path="/x/y"),
        Match.of(host="*.b.example"),
        Match.of(host="*.example", path="/x/y", method="GET", headers={"a": "1"}),
        Match.of(host="*.example", path_regex="/x/[y]"),
        Match.of(host="*.example"),
        Match.of(path="/x/y", method="GET", headers={"a": "1", "b": "2"}),
        Match.of(path="/x/y", method="GET", headers={"a": "1"}, query={"q": "1"}),
        Match.of(path="/x/y", method="GET", headers={"a": "1"}),
        Match.of(path="/x/y", method="GET", query={"q": "1", "r": "2"}),
        Match.of(path="/x/y", method="GET"),
        Match.of(path="/x/y", headers={"a": "1", "b": "2"}),
        Match.of(path="/x/y", headers={"b": "2"}, query={"r": "2"}),
        Match.of(path="/x/y", query={"q": "1"}),
        Match.of(path="/x/y"),
        Match.of(path_regex="/x/[y]+", method="GET"),
        Match.of(path_regex="/x/[y]+"),
        Match.of(path_regex="/x/.", method="GET"),
        Match.of(path_regex="/./y"),
        Match.of(path_prefix="/x/y"),
        Match.of(path_prefix="/x/", query={"q": "1"}),
        Match.of(path_prefix="/x/"),
        Match.of(path_prefix="/x", headers={"a": "1", "b": "2"}),
        Match.of(path_prefix="/x"),
        Match.of(path_prefix="/", method="GET"),
        Match.of(path_prefix="/"),
        Match.of(method="GET", headers={"a": "1"}),
        Match.of(method="GET"),
        Match.of(headers={"a": "1"}),
        Match.of(),
    )
    HEAD = request(b"/x/y?q=1&r=2", b"a.b.example", fields=((b"a", b"1"), (b"b", b"2")))

    @pytest.mark.parametrize("first", range(len(ORDERED)))
    def test_in_whatever_order_they_are_given(self, first: int) -> None:
        entries = [(match, number) for number, match in enumerate(self.ORDERED)][first:]
        assert RouteTable(entries).find(self.HEAD, b"/x/y") == first
        # Two expressions of one length keep their order: that is a rule of its own.
        backwards = [entry for entry in reversed(entries) if entry[1] not in (17, 18)]
        backwards += [entry for entry in entries if entry[1] in (17, 18)]
        assert RouteTable(backwards).find(self.HEAD, b"/x/y") == first

    def test_and_if_its_conditions_fail_the_next_one_does(self) -> None:
        table = table_of(
            host=Match.of(host="a.example", path="/x", method="POST"),
            wild=Match.of(host="*.example", path_prefix="/x", headers={"a": "1"}),
            any=Match.of(path_regex="/x", query={"q": "1"}),
            rest=Match.of(path_prefix="/"),
        )
        assert ask(table, request(b"/x", method=b"POST")) == "host"
        assert ask(table, request(b"/x", fields=((b"a", b"1"),))) == "wild"
        assert ask(table, request(b"/x?q=1")) == "any"
        assert ask(table, request(b"/x")) == "rest"


# -- the reference: every route, by rank


def holds(match: Match, head: RequestHead, path: bytes) -> bool:
    host = head.authority.lower().split(b":")[0].removesuffix(b".")
    is_path = path.startswith(b"/")
    if match.host is not None:
        if match.is_wildcard and not (host.endswith(b"." + match.host) and host != b"." + match.host):
            return False
        if not match.is_wildcard and host != match.host:
            return False
    if match.path is not None and path != match.path:
        return False
    if match.path_prefix is not None:
        prefix = match.path_prefix
        if not (path == prefix or path.startswith(prefix.rstrip(b"/") + b"/")):
            return False
        if prefix.endswith(b"/") and not path.startswith(prefix):
            return False
    if match.path_regex is not None:
        # The expressions below are letters and one dot with an asterisk.
        start = match.path_regex.removesuffix(b".*")
        if not is_path or (path != start and not (start != match.path_regex and path.startswith(start))):
            return False
    fields: dict[bytes, bytes] = {}
    for name, value in head.headers:
        fields[name] = fields[name] + b", " + value if name in fields else value
    given: dict[bytes, bytes] = {}
    for pair in head.path.partition(b"?")[2].split(b"&"):
        given.setdefault(pair.partition(b"=")[0], pair.partition(b"=")[2])
    return (
        match.method in (None, head.method)
        and all(fields.get(name) == value for name, value in match.headers)
        and all(given.get(name) == value for name, value in match.query)
    )


def rank(match: Match, first_with_regex: Mapping[bytes, int]) -> tuple[int, ...]:
    by_host = 0 if match.host is None else 1_000 + len(match.host) if match.is_wildcard else 1_000_000
    order = 0
    if match.path is not None:
        by_path = 1_000_000
    elif match.path_regex is not None:
        by_path, order = 10_000 + len(match.path_regex), -first_with_regex[match.path_regex]
    else:
        by_path = len(match.path_prefix or b"")
    return by_host, by_path, order, match.method is not None, len(match.headers), len(match.query)


def reference(matches: Sequence[Match], head: RequestHead, path: bytes) -> set[int]:
    """The best by rank: several where the configuration would refuse the tie."""
    first_with_regex: dict[bytes, int] = {}
    for number, match in enumerate(matches):
        first_with_regex.setdefault(match.path_regex or b"", number)
    found = {n: rank(match, first_with_regex) for n, match in enumerate(matches) if holds(match, head, path)}
    return {number for number, each in found.items() if each == max(found.values())}


HOSTS = st.sampled_from(["a.x", "b.a.x", "c.b.a.x", "x", "*.x", "*.a.x", "*.b.a.x", None])
PATHS = st.lists(st.sampled_from(["", "a", "b", "aa", "."]), max_size=4).map(
    lambda each: "/" + "/".join(each)
)
PAIRS = st.dictionaries(st.sampled_from("abc"), st.sampled_from("12"), max_size=2)


@st.composite
def matches(draw: st.DrawFn) -> Match:
    kind = draw(st.sampled_from(["path", "path_prefix", "path_regex", None]))
    path = normalise(draw(PATHS).replace("/.", "/a").encode()).decode()
    if kind == "path_regex":
        path = path + draw(st.sampled_from(["", ".*"]))
    return Match.of(
        host=draw(HOSTS),
        path=path if kind == "path" else None,
        path_prefix=path if kind == "path_prefix" else None,
        path_regex=path if kind == "path_regex" else None,
        method=draw(st.sampled_from(["GET", "POST", None])),
        headers=draw(PAIRS),
        query=draw(PAIRS),
    )


@st.composite
def heads(draw: st.DrawFn) -> RequestHead:
    query = "&".join(
        f"{name}={value}" for name, value in draw(st.lists(st.tuples(*[st.sampled_from("ab12")] * 2)))
    )
    target = draw(PATHS | st.just("*")) + (f"?{query}" if query else "")
    fields = draw(
        st.lists(st.tuples(st.sampled_from([b"a", b"b", b"c"]), st.sampled_from([b"1", b"2"])), max_size=4)
    )
    host = (draw(HOSTS) or "").removeprefix("*.") + draw(st.sampled_from(["", ":80", "."]))
    return request(target.encode(), host.encode(), draw(st.sampled_from([b"GET", b"POST"])), tuple(fields))


@settings(max_examples=150)
@given(st.lists(matches(), max_size=12), st.lists(heads(), min_size=1, max_size=4))
@example([Match.of(path_prefix="//"), Match.of(path_prefix="/")], [request(b"//"), request(b"/")])
@example([Match.of(path_prefix="/a/"), Match.of(path_prefix="/a")], [request(b"/a")])
def test_the_table_gives_what_the_reference_gives(routes: list[Match], asked: list[RequestHead]) -> None:
    table = RouteTable([(match, number) for number, match in enumerate(routes)])
    for head in asked:
        path = normalise(head.path)
        best = reference(routes, head, path)
        found = table.find(head, path)
        assert (found in best) if best else (found is None)
        if found is not None:
            # Where the place and what is asked for are the same, the first given wins.
            same = [n for n in best if routes[n] == routes[found]]
            assert found == min(same)


# -- bounds


class Counting(bytes):
    """A key that counts how often a dict looks at it."""

    looked = 0

    def __hash__(self) -> int:
        Counting.looked += 1
        return super().__hash__()

    __eq__ = bytes.__eq__


def test_the_number_of_lookups_does_not_depend_on_the_number_of_routes() -> None:
    counts = []
    for size in (10, 2_000):
        entries = [(Match.of(path=f"/exact{number}"), number) for number in range(size)]
        entries += [
            (Match.of(path_prefix=f"/prefix{number}/a", method="GET"), number) for number in range(size)
        ]
        entries += [
            (Match.of(path_prefix="/p", headers={"x-a": str(number)}), number) for number in range(size)
        ]
        entries += [(Match.of(host=f"*.h{number}.example"), number) for number in range(size)]
        table = RouteTable(entries)
        Counting.looked = 0
        for path in (b"/exact7", b"/prefix7/a/b", b"/p/x", b"/none"):
            shapes = table._any.shapes(Counting(path))
            assert len(shapes) <= 1
        counts.append(Counting.looked)
    assert counts[0] == counts[1] == 4


def test_a_walk_goes_no_deeper_than_the_tree() -> None:
    class Path(bytes):
        pieces = 0

        def split(self, *args: object, **kwargs: object) -> list[bytes]:
            found = super().split(*args, **kwargs)  # type: ignore[arg-type]  # whatever bytes.split takes
            Path.pieces = len(found)
            return found

    table = table_of(a=Match.of(path_prefix="/a/b"))
    assert table.find(request(), Path(b"/a/b" + b"/" * 10_000)) == "a"
    assert Path.pieces <= 4


def test_prefixes_may_be_deep() -> None:
    prefix = "/a" * 1024
    table = table_of(deep=Match.of(path_prefix=prefix))
    assert ask(table, request(prefix.encode() + b"/x")) == "deep"
    assert ask(table, request(prefix.encode()[:-2])) is None


def test_remembered_hosts_are_bounded() -> None:
    table = table_of(any=Match(), wild=Match.of(host="*.example"))
    for number in range(5_000):
        ask(table, request(host=b"h%d.example" % number))
    assert len(table._seen) <= 1024
    table._seen.clear()
    ask(table, request(host=b"x" * 60_000))
    assert not table._seen


def test_parameters_are_bounded() -> None:
    query = b"&".join(b"p%d=1" % number for number in range(10_000))
    found = parameters(b"/?" + query)
    assert len(found) == 256
    assert b"p255" in found


def test_many_lines_of_one_field_are_joined_once() -> None:
    fields = ((b"a", b"1"), (b"b", b"x"), *((b"a", b"%d" % number) for number in range(2, 200)))
    assert combined(fields)[b"a"].startswith(b"1, 2, 3, ")
    assert combined(fields)[b"b"] == b"x"


@given(st.binary(max_size=80))
@example(b"[::1]:80:80")
@example(b"[::1")
@example(b"[v1.x]")
def test_any_authority_is_a_host_or_none(authority: bytes) -> None:
    host = host_of(authority)
    assert len(host) <= 253
    assert host == b"" or host_of(host) in (host, b"", host.partition(b":")[0].removesuffix(b"."))
