"""Routes: which exchange goes where, and what is changed on the way.

Introduces `Route` and its parts. That the pools it names exist is the business of the whole configuration.
"""

import re
from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

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
    UrlPath,
    expect_string,
)

_PERCENT = Range(0, 100, "percent")


def _parse_regex(value: object) -> str:
    text = expect_string(value, "a regular expression")
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise BadValueError(f"the regular expression is not valid: {error}") from None
    return text


Regex = Annotated[str, Custom("a regular expression", _parse_regex)]


class Match(Block):
    """What an exchange must look like; every condition given must hold."""

    host: (
        Annotated[str, Matches('a host, or "*.example.com"', r"(?:\*\.)?[0-9A-Za-z.:\[\]_-]+", lower=True)]
        | None
    ) = Field(default=None, description="Host of the request; `*.` in front matches one or more labels.")
    path: UrlPath | None = Field(default=None, description="The whole path.")
    path_prefix: UrlPath | None = Field(
        default=None, description="Beginning of the path, at a segment's end."
    )
    path_regex: Regex | None = Field(default=None, description="Regular expression for the whole path.")
    method: Annotated[str, Matches('a method such as "GET"', TOKEN)] | None = Field(
        default=None, description="Method."
    )
    headers: dict[HeaderName, str] = Field(
        default_factory=dict, description="Header fields and their exact values."
    )
    query: dict[str, str] = Field(
        default_factory=dict, description="Query parameters and their exact values."
    )

    def faults(self) -> Iterator[Fault]:
        given = [key for key in ("path", "path_prefix", "path_regex") if getattr(self, key) is not None]
        for key in given[1:]:
            yield Fault((key,), f"{given[0]} and {key} exclude each other", "keep one of them")


class Share(Block):
    """One part of a split."""

    pool: Name = Field(description="Name of a pool.")
    weight: Annotated[int, Range(0, 65535)] = Field(
        default=1, description="Its share, relative to the others."
    )


class Redirect(Block):
    """The gateway answers with a redirect."""

    to: Annotated[str, Matches("a URL or a path", r"[!-~]+")] = Field(description="Value of `Location`.")
    status: Annotated[int, Range(300, 399)] = Field(default=302, description="Status of the answer.")


class Respond(Block):
    """The gateway answers by itself."""

    status: Annotated[int, Range(200, 599)] = Field(description="Status of the answer.")
    body: str = Field(default="", description="Body of the answer.")
    content_type: HeaderValue = Field(default="text/plain; charset=utf-8", description="Its media type.")


class Rewrite(Block):
    """Changes to the request target and host before it is forwarded."""

    host: Annotated[str, Matches("a host", r"[0-9A-Za-z.:\[\]_-]+")] | None = Field(
        default=None, description="New host."
    )
    path: UrlPath | None = Field(default=None, description="New path.")
    strip_prefix: UrlPath | None = Field(default=None, description="Prefix taken from the path.")
    add_prefix: UrlPath | None = Field(default=None, description="Prefix put before the path.")


class HeaderEdit(Block):
    """Changes to the header of one direction."""

    set: dict[HeaderName, HeaderValue] = Field(
        default_factory=dict, description="Fields that replace what is there."
    )
    add: dict[HeaderName, HeaderValue] = Field(
        default_factory=dict, description="Fields added to what is there."
    )
    remove: Annotated[tuple[HeaderName, ...], LIST] = Field(default=(), description="Fields taken away.")


class Headers(Block):
    """Header changes of a route."""

    request: HeaderEdit | None = Field(default=None, description="Changes on the way to the backend.")
    response: HeaderEdit | None = Field(default=None, description="Changes on the way to the client.")


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


_ACTIONS = ("pool", "split", "redirect", "respond")


class Route(Block):
    """A rule: what matches, and what becomes of it. The most specific match wins."""

    match: Match = Field(default_factory=Match, description="Conditions; none = everything.")
    pool: Name | None = Field(default=None, description="Forward to this pool.")
    split: Annotated[tuple[Share, ...], LIST] = Field(
        default=(), description="Forward to several pools by weight: `[{pool, weight}]`."
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

    def pools(self) -> Iterator[tuple[tuple[str | int, ...], str]]:
        """Every pool the route names, with the location of the name."""
        if self.pool is not None:
            yield ("pool",), self.pool
        for index, share in enumerate(self.split):
            yield ("split", index, "pool"), share.pool
        if self.mirror is not None:
            yield ("mirror", "pool"), self.mirror.pool

    def specificity(self) -> tuple[object, ...]:
        """Equal for two routes exactly if they match the same exchanges and none is more specific."""
        m = self.match
        return (
            m.host,
            m.path,
            m.path_prefix,
            m.path_regex,
            m.method,
            tuple(sorted(m.headers.items())),
            tuple(sorted(m.query.items())),
        )
