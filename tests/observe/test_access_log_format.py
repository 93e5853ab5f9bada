"""The two forms of a line: what stands where, and that no byte of a peer can end a string or a line."""

import json
import re
import tracemalloc
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from expressgateway.observe.access_format import FORMS, CombinedForm, Entry, Form, JsonForm
from expressgateway.proxy.errors import Reason, status_of


def entry(**changed: Any) -> Entry:
    """An exchange by the names of its fields."""
    values: dict[str, Any] = {
        "ended_ms": 1_700_000_000_007,
        "listener": "web",
        "client": b"192.0.2.7",
        "method": b"GET",
        "authority": b"example.com",
        "target": b"/a?b=%20c",
        "version": b"1.1",
        "status": 200,
        "request_bytes": 12,
        "response_bytes": 3456,
        "duration_s": 0.0123456,
        "connect_s": 0.001,
        "head_s": 0.0111114,
        "route": "/a",
        "pool": "app",
        "backend": "app-1",
        "attempts": 2,
        "flags": ("retry_connect", "queued"),
        "request_id": b"abc-01",
        "trace_id": b"0af7651916cd43dd8448eb211c80319c",
        "span_id": b"00f067aa0ba902b7",
        "user_agent": b"curl/8.5",
        "referer": b"https://example.com/",
    }
    values.update(changed)

    def of(*names: str) -> Any:
        return tuple(values[name] for name in names)

    common = of("listener", "route", "pool", "backend", "status", "attempts", "flags")
    return (
        (common, *of("method", "authority", "version")),
        values["client"],
        of("target", "request_id", "trace_id", "span_id"),
        of("user_agent", "referer"),
        values["ended_ms"],
        of("request_bytes", "response_bytes"),
        of("duration_s", "connect_s", "head_s"),
    )


def line_of(form: Form, one: Entry) -> str:
    (line,) = form.lines([one])
    return line.decode("ascii")


def json_line(one: Entry) -> str:
    return line_of(JsonForm(), one)


def combined_line(one: Entry) -> str:
    return line_of(CombinedForm(), one)


NOTHING: dict[str, Any] = {
    "method": b"",
    "authority": b"",
    "target": b"",
    "version": b"",
    "status": 0,
    "request_bytes": 0,
    "response_bytes": 0,
    "connect_s": None,
    "head_s": None,
    "route": "",
    "pool": "",
    "backend": "",
    "attempts": 0,
    "flags": (),
    "request_id": b"",
    "trace_id": b"",
    "span_id": b"",
    "user_agent": b"",
    "referer": b"",
}


class TestGolden:
    def test_json(self) -> None:
        assert json_line(entry()) == (
            '{"time":"2023-11-14T22:13:20.007Z","listener":"web","client":"192.0.2.7","method":"GET",'
            '"authority":"example.com","target":"/a?b=%20c","version":"1.1","status":200,"request_bytes":12,'
            '"response_bytes":3456,"duration_s":0.012346,"connect_s":0.001000,"head_s":0.011111,'
            '"route":"/a","pool":"app","backend":"app-1","attempts":2,"flags":["retry_connect","queued"],'
            '"request_id":"abc-01","trace_id":"0af7651916cd43dd8448eb211c80319c",'
            '"span_id":"00f067aa0ba902b7","user_agent":"curl/8.5","referer":"https://example.com/"}\n'
        )

    def test_json_of_a_connection_that_sent_nothing(self) -> None:
        assert json_line(entry(**NOTHING)) == (
            '{"time":"2023-11-14T22:13:20.007Z","listener":"web","client":"192.0.2.7","method":"",'
            '"authority":"","target":"","version":"","status":0,"request_bytes":0,"response_bytes":0,'
            '"duration_s":0.012346,"connect_s":null,"head_s":null,"route":"","pool":"","backend":"",'
            '"attempts":0,"flags":[],"request_id":"","trace_id":"","span_id":"","user_agent":"",'
            '"referer":""}\n'
        )

    def test_combined(self) -> None:
        assert combined_line(entry()) == (
            '192.0.2.7 - - [14/Nov/2023:22:13:20 +0000] "GET /a?b=%20c HTTP/1.1" 200 3456 '
            '"https://example.com/" "curl/8.5" request_bytes=12 duration_s=0.012346 connect_s=0.001000 '
            'head_s=0.011111 listener="web" authority="example.com" route="/a" pool="app" backend="app-1" '
            'attempts=2 flags="retry_connect,queued" request_id="abc-01" '
            'trace_id="0af7651916cd43dd8448eb211c80319c" span_id="00f067aa0ba902b7"\n'
        )

    def test_combined_of_a_connection_that_sent_nothing(self) -> None:
        assert combined_line(entry(**NOTHING)) == (
            '192.0.2.7 - - [14/Nov/2023:22:13:20 +0000] "-" 000 0 "-" "-" request_bytes=0 '
            'duration_s=0.012346 connect_s=- head_s=- listener="web" authority="-" route="-" pool="-" '
            'backend="-" attempts=0 flags="-" request_id="-" trace_id="-" span_id="-"\n'
        )

    def test_what_was_cut_says_so(self) -> None:
        long = entry(target=b"/" + b"x" * 99)
        line = json.loads(JsonForm().cut(long, 10))
        assert (line["target"], line["cut"], line["referer"]) == ("/" + "x" * 9, True, "https://ex")
        assert CombinedForm().cut(long, 10).endswith(b" cut=1\n")

    def test_every_second_has_its_own_time(self) -> None:
        for name, first, second in (
            ("json", "2023-11-14T22:13:20.999Z", "2023-11-14T22:13:21.000Z"),
            ("combined", "[14/Nov/2023:22:13:20 +0000]", "[14/Nov/2023:22:13:21 +0000]"),
        ):
            form = FORMS[name]()
            assert first in line_of(form, entry(ended_ms=1_700_000_000_999))
            assert second in line_of(form, entry(ended_ms=1_700_000_001_000))
            assert first in line_of(form, entry(ended_ms=1_700_000_000_999))

    @pytest.mark.parametrize(
        ("raw", "escaped"),
        [
            (b'a"b', '"a\\"b"'),
            (b"a\\b", '"a\\\\b"'),
            (b"a\r\nb\t\0", '"a\\x0d\\x0ab\\x09\\x00"'),
            (b"\x1b[31m\x7f", '"\\x1b[31m\\x7f"'),
            ("é".encode(), '"\\xc3\\xa9"'),
        ],
    )
    def test_combined_escapes_as_apache_does(self, raw: bytes, escaped: str) -> None:
        assert combined_line(entry(user_agent=raw)).split(' "https://example.com/" ')[1].startswith(escaped)

    def test_names_of_any_script(self) -> None:
        assert json.loads(json_line(entry(pool="läden€😀")))["pool"] == "läden€😀"
        assert 'pool="l\\xe4den\\u20ac\\U0001f600"' in combined_line(entry(pool="läden€😀"))


RAW = (
    "client",
    "method",
    "authority",
    "target",
    "version",
    "request_id",
    "trace_id",
    "span_id",
    "user_agent",
    "referer",
)
NAMES = ("listener", "route", "pool", "backend")
peers = st.fixed_dictionaries(
    {
        name: st.binary(max_size=40) | st.sampled_from([b'"', b"\\", b'\n{"a":1}\n', b'\\"', b" "])
        for name in RAW
    }
)
names = st.fixed_dictionaries({name: st.text(max_size=10) for name in NAMES})

_STRING = r'"((?:[^"\\\x00-\x1f\x7f-\U0010ffff]|\\["\\]|\\x[0-9a-f]{2}|\\u[0-9a-f]{4}|\\U[0-9a-f]{8})*)"'
COMBINED = re.compile(
    rf"([!-~]+) - - \[[^\]]*\] {_STRING} \d{{3}} \d+ {_STRING} {_STRING} request_bytes=\d+ duration_s=\S+"
    rf" connect_s=\S+ head_s=\S+ listener={_STRING} authority={_STRING} route={_STRING} pool={_STRING}"
    rf" backend={_STRING} attempts=\d+ flags={_STRING} request_id={_STRING} trace_id={_STRING}"
    rf" span_id={_STRING}\n"
)


def unescaped(text: str) -> bytes:
    return re.sub(
        r'\\(?:(["\\])|x(..))', lambda m: m[1] or chr(int(m[2], 16)), "" if text == "-" else text
    ).encode("latin-1")


class TestInjection:
    @given(peers, names)
    @example(dict.fromkeys(RAW, bytes(range(256))), dict.fromkeys(NAMES, '\x00"\\\n\u2028\ud800'))
    def test_json_gives_back_what_came(self, raw: dict[str, Any], named: dict[str, Any]) -> None:
        line = json_line(entry(**raw, **named))
        assert re.fullmatch(r"[ -~]+\n", line)
        read = json.loads(line)
        assert len(read) == 23
        for name in RAW:
            assert read[name].encode("latin-1") == raw[name]
        for name in NAMES:
            assert read[name] == named[name]

    @given(peers, names)
    @example(dict.fromkeys(RAW, bytes(range(256))), dict.fromkeys(NAMES, '\x00"\\\n\u2028\ud800'))
    def test_combined_keeps_every_field_in_its_place(
        self, raw: dict[str, Any], named: dict[str, Any]
    ) -> None:
        line = combined_line(entry(**raw, **named))
        assert re.fullmatch(r"[ -~]+\n", line)
        match = COMBINED.fullmatch(line)
        assert match is not None
        found = match.groups()
        for name, text in (("referer", found[2]), ("user_agent", found[3]), ("authority", found[5])):
            assert unescaped(text) == (b"" if raw[name] == b"-" else raw[name])
        assert unescaped(found[0]) == (b"" if raw["client"] == b"-" else raw["client"])

    @given(peers, st.integers(0, 30))
    def test_what_was_cut_is_short_and_valid(self, raw: dict[str, Any], length: int) -> None:
        read = json.loads(JsonForm().cut(entry(**raw), length))
        assert all(read[name].encode("latin-1") == raw[name][:length] for name in RAW)
        line = CombinedForm().cut(entry(**raw), length).decode("ascii")
        assert COMBINED.fullmatch(line.replace(" cut=1\n", "\n"))


numbers = st.integers(0, 1 << 40)
spans_s = st.floats(0, 1e5)
entries = st.builds(
    lambda raw, named, rest: entry(**raw, **named, **rest),
    peers,
    names,
    st.fixed_dictionaries(
        {
            "ended_ms": st.integers(0, 1 << 42),
            "status": st.sampled_from([0, 200, 404, 499]),
            "request_bytes": numbers,
            "response_bytes": numbers,
            "duration_s": spans_s,
            "connect_s": st.none() | spans_s,
            "head_s": st.none() | spans_s,
            "attempts": st.integers(0, 9),
            "flags": st.lists(st.sampled_from(["queued", "panic", "retry_reset"]), unique=True).map(tuple),
        }
    ),
)
CLEAN = entry(user_agent=b"", referer=b"", flags=())


def plain_json(one: Entry) -> bytes:
    """The line made the slow way."""
    ((names, method, authority, version), client, raw, said, ended_ms, sizes, times) = one
    listener, route, pool, backend, status, attempts, flags = names
    at = datetime.fromtimestamp(ended_ms // 1000, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    fields: dict[str, Any] = {
        "time": f"{at}.{ended_ms % 1000:03}Z",
        "listener": listener,
        "client": client,
        "method": method,
        "authority": authority,
        "target": raw[0],
        "version": version,
        "status": status,
        "request_bytes": sizes[0],
        "response_bytes": sizes[1],
        **dict(zip(("duration_s", "connect_s", "head_s"), times, strict=True)),
        "route": route,
        "pool": pool,
        "backend": backend,
        "attempts": attempts,
        "flags": list(flags),
        **dict(zip(("request_id", "trace_id", "span_id"), raw[1:], strict=True)),
        "user_agent": said[0],
        "referer": said[1],
    }

    def written(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.6f}"
        return json.dumps(
            value.decode("latin-1") if isinstance(value, bytes) else value, separators=(",", ":")
        )

    body = ",".join(f'"{name}":{written(value)}' for name, value in fields.items())
    return f"{{{body}}}\n".encode()


def plain_combined(one: Entry) -> bytes:
    """Likewise."""
    ((names, *head), client, raw, said, ended_ms, sizes, times) = one
    listener, route, pool, backend, status, attempts, flags = names

    def safe(text: str | bytes) -> str:
        text = text.decode("latin-1") if isinstance(text, bytes) else text
        text = text.replace("\\", "\\\\").replace('"', '\\"')
        return (
            "".join(
                c
                if " " <= c <= "~"
                else c.encode("ascii", "backslashreplace").decode()
                if ord(c) > 255
                else f"\\x{ord(c):02x}"
                for c in text
            )
            or "-"
        )

    method, authority, version = map(safe, head)
    target, request_id, trace, span = map(safe, raw)
    duration, connect, until_head = ("-" if each is None else f"{each:.6f}" for each in times)
    at = datetime.fromtimestamp(ended_ms // 1000, UTC).strftime("%d/%b/%Y:%H:%M:%S +0000")
    request = f"{method} {target} HTTP/{version}" if head[0] else "-"
    word = safe(client).replace(" ", "\\x20")
    return (
        f'{word} - - [{at}] "{request}" {status:03} {sizes[1]} "{safe(said[1])}"'
        f' "{safe(said[0])}" request_bytes={sizes[0]} duration_s={duration} connect_s={connect}'
        f' head_s={until_head} listener="{safe(listener)}" authority="{authority}" route="{safe(route)}"'
        f' pool="{safe(pool)}" backend="{safe(backend)}" attempts={attempts} flags="{safe(",".join(flags))}"'
        f' request_id="{request_id}" trace_id="{trace}" span_id="{span}"\n'
    ).encode()


class TestManyAtOnce:
    @given(st.lists(entries | st.just(CLEAN), min_size=1, max_size=6))
    @example([CLEAN, entry(target=b'"'), CLEAN])
    @example([entry(target=b"/%s%%"), entry(pool="%d", method=b"%b"), CLEAN])
    def test_lines_are_as_if_made_one_by_one_the_slow_way(self, many: list[Entry]) -> None:
        for form, plain in ((JsonForm(), plain_json), (CombinedForm(), plain_combined)):
            for _ in range(2):
                assert form.lines(many) == list(map(plain, many))


class TestDocument:
    TEXT = (Path(__file__).parents[2] / "docs" / "access-log.md").read_text()

    def test_every_field_is_explained(self) -> None:
        fields = self.TEXT.partition("## Fields")[2].partition("## Flags")[0]
        assert re.findall(r"^\| `(\w+)` \|", fields, re.MULTILINE) == list(
            json.loads(JsonForm().cut(entry(), 100))
        )

    def test_every_reason_is_explained_with_its_status(self) -> None:
        flags = self.TEXT.partition("<!-- flags:begin -->")[2].partition("<!-- flags:end -->")[0]
        rows = re.findall(r"^\| `(\w+)` \| (\d+) \|", flags, re.MULTILINE)
        assert rows == [(reason.value, str(status_of(reason))) for reason in Reason]


class TestWhatIsWrittenAgain:
    """JSON lines are made from parts that were written before; no line differs for it."""

    def test_names_are_no_formats(self) -> None:
        form = JsonForm()
        for _ in range(2):
            line = json.loads(line_of(form, entry(pool="a%sb%d", authority=b"100%", target=b"/%s%%")))
            assert (line["pool"], line["authority"], line["target"]) == ("a%sb%d", "100%", "/%s%%")

    def test_more_of_them_than_are_kept(self) -> None:
        form = JsonForm()
        for turn in range(2):
            for number in range(3000):
                name = b"host-%d" % number
                line = json.loads(line_of(form, entry(authority=name, user_agent=name, status=200 + turn)))
                assert (line["authority"], line["user_agent"]) == (name.decode(), name.decode())

    def test_long_ones_are_not_kept(self) -> None:
        form = JsonForm()
        tracemalloc.start()
        try:
            for number in range(2000):
                line_of(form, entry(authority=b"%05d" % number * 2000, referer=b"%05d" % number * 2000))
            kept_bytes, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert kept_bytes < 1_000_000
