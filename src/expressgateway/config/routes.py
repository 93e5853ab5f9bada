"""Routes: which exchange goes where, and what is changed on the way.

Introduces `Route` and its parts; what a route matches is in `matches`. That the pools it names exist is the
business of the whole configuration.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Final

from pydantic import Field

from expressgateway.config.matches import (
    HOP_BY_HOP,
    MAX_NAME_CHARS,
    Match,
    MatchedPath,
    SentPath,
    no_twins,
    parse_host,
    ties,
)
from expressgateway.config.pools import Retry
from expressgateway.config.values import (
    LIST,
    TOKEN,
    BadValueError,
    Block,
    Custom,
    Fault,
    HeaderName,
    HeaderValue,
    Matches,
    Name,
    Range,
    before,
    expect_string,
    listed,
    shown,
)

_PERCENT = Range(0, 100, "percent")


class Share(Block):
    """One part of a split."""

    pool: Name = Field(description="Name of a pool.")
    weight: Annotated[int, Range(0, 65535)] = Field(
        default=1, description="Its share, relative to the others."
    )


_REDIRECTS: Final = (301, 302, 303, 307, 308)
_PLACEHOLDERS: Final = ("{scheme}", "{host}", "{path}", "{query}")


def _parse_location(value: object) -> str:
    what = "a URL or a path"
    text = expect_string(value, what)
    if re.fullmatch(r"[!-~]+", text) is None:
        hint = "" if text.isascii() or not text else "write other characters percent-encoded, as in %C3%A9"
        raise BadValueError(f"expected {what}, found {shown(text)}", hint)
    for word in re.findall(r"\{[^{}]*\}|[{}]", text):
        if word not in _PLACEHOLDERS:
            raise BadValueError(
                f"{shown(word)} is no placeholder",
                f"there are {listed(_PLACEHOLDERS)}; as characters of a URL, braces are written %7B and %7D",
            )
    if re.search(r"[/\\]\{path\}", text):
        raise BadValueError(
            f"{shown(text)} has a slash before {{path}}", "{path} begins with one: leave it out"
        )
    return text


def _parse_redirect_status(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value in _REDIRECTS:
        return value
    raise BadValueError(
        f"expected 301, 302, 303, 307 or 308, found {shown(value)}",
        "" if isinstance(value, int) else "write the number without quotes",
    )


class Redirect(Block):
    """The gateway answers with a redirect."""

    to: Annotated[str, Custom("a URL or a path", _parse_location)] = Field(
        description="Value of `Location`. In it `{scheme}`, `{host}` (without port), `{path}` and `{query}` "
        "(with its question mark) are those of the request."
    )
    status: Annotated[
        int, Custom("301, 302, 303, 307, 308", _parse_redirect_status, (("enum", list(_REDIRECTS)),))
    ] = Field(default=302, description="Status of the answer.")


class Respond(Block):
    """The gateway answers by itself."""

    status: Annotated[int, Range(200, 599)] = Field(description="Status of the answer.")
    body: str = Field(default="", description="Body of the answer.")
    content_type: HeaderValue = Field(default="text/plain; charset=utf-8", description="Its media type.")

    def faults(self) -> Iterator[Fault]:
        if self.body and self.status in (204, 205, 304):
            yield Fault(
                ("body",),
                f"an answer with status {self.status} has no body",
                "remove the body, or choose another status",
                depends=(("status",),),
            )


def _parse_authority(value: object) -> str:
    what = 'a host such as "app.example" or "app.example:8080"'
    text = expect_string(value, what)
    port = re.search(r"(?<=[^:]):([0-9]+)\Z", text) if text.count(":") == 1 or "]:" in text else None
    host = parse_host(text[: port.start()] if port else text, what=what)
    if port and (len(port[1]) > 5 or not 1 <= int(port[1]) <= 65535):
        raise BadValueError(f"expected a port from 1 to 65535, found {shown(port[1])}")
    return f"{host}:{int(port[1])}" if port else host


class Rewrite(Block):
    """Changes to the request target and host before it is forwarded."""

    host: Annotated[str, Custom("host or `host:port`", _parse_authority)] | None = Field(
        default=None, description="New host."
    )
    path: SentPath | None = Field(default=None, description="New path; the query stays.")
    strip_prefix: MatchedPath | None = Field(
        default=None, description="Prefix taken from the path, if it begins with it at a segment's end."
    )
    add_prefix: SentPath | None = Field(
        default=None, description="Prefix put before the path, after `strip_prefix`."
    )

    def faults(self) -> Iterator[Fault]:
        for key in ("strip_prefix", "add_prefix"):
            value = getattr(self, key)
            if value is not None and self.path is not None:
                yield Fault((key,), f"path and {key} exclude each other", "path replaces the whole path")
            elif value is not None and not value.rstrip("/"):
                yield Fault((key,), f"{key} has no effect: every path begins with a slash", "remove the key")


_HeaderValues = Annotated[dict[HeaderName, HeaderValue], before(no_twins)]


class HeaderEdit(Block):
    """Changes to the header of one direction: fields are removed, then set, then added."""

    set: _HeaderValues = Field(default_factory=dict, description="Fields that replace what is there.")
    add: _HeaderValues = Field(default_factory=dict, description="Fields added to what is there.")
    remove: Annotated[tuple[HeaderName, ...], LIST] = Field(default=(), description="Fields taken away.")

    def named(self) -> Iterator[tuple[tuple[str | int, ...], str]]:
        """Every field that is changed, with the location of its name."""
        yield from ((("set", name), name) for name in self.set)
        yield from ((("add", name), name) for name in self.add)
        yield from ((("remove", index), name) for index, name in enumerate(self.remove))

    def faults(self) -> Iterator[Fault]:
        for loc, name in self.named():
            if name == "host":
                yield Fault(loc, "Host is not changed as a field", "use rewrite.host")
            elif name in HOP_BY_HOP or name in _FRAMING:
                yield Fault(
                    loc,
                    f"{name} belongs to one connection, not to the message: the gateway writes its own",
                    "remove it",
                )
        for index, name in enumerate(self.remove):
            if name in self.set:
                yield Fault(
                    ("remove", index),
                    f"{name} is in remove and in set",
                    "set replaces what is there: keep set only",
                )


_FRAMING: Final = frozenset({"expect", "trailer"})
"""Fields beside those hop by hop that say how a message is sent."""

FORWARDING: Final = frozenset(
    {
        "forwarded",
        "traceparent",
        "tracestate",
        "via",
        "x-forwarded-for",
        "x-forwarded-host",
        "x-forwarded-proto",
        "x-request-id",
    }
)
"""Fields of requests that the gateway writes itself, for everyone behind it to rely on."""


class Headers(Block):
    """Header changes of a route."""

    request: HeaderEdit | None = Field(default=None, description="Changes on the way to the backend.")
    response: HeaderEdit | None = Field(default=None, description="Changes on the way to the client.")

    def faults(self) -> Iterator[Fault]:
        if self.request is not None:
            for loc, name in self.request.named():
                if name in FORWARDING:
                    yield Fault(
                        ("request", *loc),
                        f"{name} is written by the gateway itself",
                        "http.forwarded and http.via of the listener say what is written",
                    )


class Timeouts(Block):
    """Times that differ from the listener's."""

    body_timeout_ms: Annotated[int, Range(1, unit="milliseconds")] | None = Field(
        default=None, description="As in `listeners.http`."
    )
    total_timeout_ms: Annotated[int, Range(1, unit="milliseconds", zero="off")] | None = Field(
        default=None, description="As in `listeners.http`."
    )
    head_timeout_ms: Annotated[int, Range(1, unit="milliseconds")] | None = Field(
        default=None, description="As in `listeners.http`."
    )


class Mirror(Block):
    """A copy of the request whose answer nobody waits for."""

    pool: Name = Field(description="Name of a pool.")
    percent: Annotated[int, _PERCENT] = Field(default=100, description="Percent of requests that are copied.")


_ACTIONS: Final = ("pool", "split", "redirect", "respond")
_FORWARDS_ONLY: Final = ("rewrite", "timeouts", "retry", "mirror", "filters")


def _parse_name(value: object) -> str:
    text = expect_string(value, "a name")
    if not 1 <= len(text) <= MAX_NAME_CHARS or not text.isprintable() or text != text.strip():
        raise BadValueError(
            f"expected a name of 1 to {MAX_NAME_CHARS} visible characters, found {shown(text)}"
        )
    return text


class Route(Block):
    """A rule: what matches, and what becomes of it. The most specific match wins."""

    name: Annotated[str, Custom(f"name of at most {MAX_NAME_CHARS} characters", _parse_name)] = Field(
        default="",
        description="Used in metrics and logs.",
        json_schema_extra={"default_text": "made from `match`"},
    )
    match: Match = Field(default_factory=Match, description="Conditions; none = everything.")
    pool: Name | None = Field(default=None, description="Forward to this pool.")
    split: Annotated[tuple[Share, ...], LIST] = Field(
        default=(), description="Forward to several pools by weight: `[{pool, weight}]`."
    )
    sticky: (
        Annotated[
            str,
            Matches(
                '"client_ip", "path", "header:NAME" or "cookie:NAME"',
                rf"client_ip|path|(?:header|cookie):{TOKEN}",
            ),
        ]
        | None
    ) = Field(
        default=None,
        description="`split`: what decides the share, so that the same client, field or cookie gets the same "
        "pool; without it each request is drawn anew, and so is one that has no such thing. A client without "
        "the cookie is given one.",
    )
    redirect: Redirect | None = Field(default=None, description="Answer with a redirect.")
    respond: Respond | None = Field(default=None, description="Answer without a backend.")
    rewrite: Rewrite | None = Field(default=None, description="Change target and host.")
    headers: Headers | None = Field(default=None, description="Change headers.")
    timeouts: Timeouts | None = Field(default=None, description="Other times than the listener's.")
    retry: Retry | None = Field(default=None, description="Other retries than the pool's.")
    mirror: Mirror | None = Field(default=None, description="Copy requests to another pool.")
    filters: Annotated[tuple[Name, ...], LIST] = Field(
        default=(), description="Filters, in order: built-in names or `package.module:Class`."
    )

    def resolve(self) -> None:
        if not self.name:
            self.settle(name=self.match.text())

    def faults(self) -> Iterator[Fault]:
        given = [key for key in _ACTIONS if getattr(self, key)]
        if not given:
            yield Fault(
                (), f"a route needs one of {', '.join(_ACTIONS)}", depends=tuple((key,) for key in _ACTIONS)
            )
        for key in given[1:]:
            yield Fault(
                (key,), f"{given[0]} and {key} exclude each other", "a route does one thing: keep one of them"
            )
        if self.split and not any(share.weight for share in self.split):
            yield Fault(("split",), "every share of the split has weight 0")
        if self.sticky is not None and not self.split:
            yield Fault(
                ("sticky",),
                "sticky has no effect without a split",
                "to keep a client with one backend of a pool, use load_balancing of the pool",
                depends=(("split",),),
            )
        if given and given[0] in ("redirect", "respond"):
            yield from self._answer_faults(given[0])

    def _answer_faults(self, action: str) -> Iterator[Fault]:
        locs: list[tuple[str, ...]] = [(key,) for key in _FORWARDS_ONLY if getattr(self, key)]
        if self.headers is not None and self.headers.request is not None:
            locs.append(("headers", "request"))
        for loc in locs:
            yield Fault(
                loc,
                f"{loc[-1]} has no effect on a route with {action}",
                "nothing is forwarded: remove it",
                depends=((action,),),
            )

    def pools(self) -> Iterator[tuple[tuple[str | int, ...], str]]:
        """Every pool the route names, with the location of the name."""
        if self.pool is not None:
            yield ("pool",), self.pool
        for index, share in enumerate(self.split):
            yield ("split", index, "pool"), share.pool
        if self.mirror is not None:
            yield ("mirror", "pool"), self.mirror.pool


def route_faults(where: str, routes: Sequence[Route]) -> Iterator[Fault]:
    """Rules among the routes of one listener; `where` is the key of their array."""
    for index, first in ties([route.match for route in routes]):
        is_same = routes[index].match == routes[first].match
        why = "matches exactly the same" if is_same else "is as specific, and some requests match both"
        yield Fault(
            (where, index, "match"),
            f"{{other}} {why}, so neither can win",
            "remove one of the two, or make one more specific"
            if is_same
            else "make one more specific, or give both the same field or parameter with different values",
            depends=((where, first), *((where, first, "match", key) for key in Match.model_fields)),
            other=(where, first),
        )
    first_of: dict[str, int] = {}
    for index, route in enumerate(routes):
        first = first_of.setdefault(route.name, index)
        # Names made from the match are the same for the same match only, and that has been said.
        if first != index and (route.is_set("name") or routes[first].is_set("name")):
            yield Fault(
                (where, index, "name"),
                f"the name {shown(route.name)} is already taken by {{other}}",
                "give each route its own name",
                depends=((where, first, "name"),),
                other=(where, first),
            )
