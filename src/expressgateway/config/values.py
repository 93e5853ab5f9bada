"""The values a configuration is made of, and how a wrong one is described.

Introduces `BadValueError` (one value is wrong by itself), `Fault` (values are wrong together), `Block` (a
TOML table whose rules can name the exact key at fault), and the value types `Address`, `Range`, `Matches`,
`FilePath` and `Network`. Messages are written here, next to the rule they explain; where a key stands in a
file is not known here.
"""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import date, datetime, time
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PlainSerializer,
    PlainValidator,
    SerializerFunctionWrapHandler,
    Strict,
    ValidationInfo,
    WithJsonSchema,
    model_serializer,
    model_validator,
)
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, ValidationError, core_schema

Loc = tuple[str | int, ...]
"""Where a value sits in the document: `("listeners", 0, "address")`."""

MAX_INT = 2**63 - 1
"""The largest integer TOML promises to carry; the upper end of ranges that have no other."""

LIST = Strict(False)
"""Lets a TOML array fill a tuple; the items stay strict."""


class BadValueError(ValueError):
    """A value that is wrong by itself: a sentence, and optionally what to do about it."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


@dataclass(frozen=True, slots=True)
class Fault:
    """Values that are wrong together, placed at the key the operator should look at."""

    loc: Loc
    message: str
    """`{other}` stands for the location `other`."""
    hint: str = ""
    depends: tuple[Loc, ...] = ()
    """Other keys the verdict rests on: if one of them is itself wrong, the fault is not reported."""
    other: Loc = ()

    def sentence(self, other: Loc) -> str:
        """The message, naming `other`, which is this fault's `other` as the reader knows it."""
        return self.message.replace("{other}", dotted(other))

    def error(self) -> InitErrorDetails:
        context = {"message": self.sentence(self.other), "hint": self.hint}
        return InitErrorDetails(
            type=PydanticCustomError("fault", "{message}", context), loc=self.loc, input=None
        )


def quoted(text: object) -> str:
    """The text in quotes, with escapes for what a terminal would obey or not show."""
    written = json.dumps(str(text), ensure_ascii=False)
    return "".join(char if char.isprintable() else f"\\u{ord(char):04x}" for char in written)


def shown(value: object) -> str:
    """`value` as the operator wrote it, short enough for a sentence."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return quoted(value if len(value) <= 60 else value[:57] + "...")
    if isinstance(value, int):
        return str(value) if abs(value) < 10**20 else "a number of more than 20 digits"
    if isinstance(value, float):
        return str(value)
    if isinstance(value, list | tuple):
        return "an array"
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, datetime | date | time):
        return "a date or time"
    return "a value of another type"


def dotted(loc: Loc) -> str:
    """`loc` as operators read it: `listeners[0].http.via`."""
    text = ""
    for part in loc:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            name = part if part and all(c.isalnum() or c in "_-" for c in part) else shown(part)
            text += f".{name}" if text else name
    return text


def listed(words: Iterable[str]) -> str:
    """`a, b and c`."""
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def error_of(bad: BadValueError) -> PydanticCustomError:
    """The form in which a `BadValueError` travels through pydantic."""
    return PydanticCustomError("bad_value", "{message}", {"message": bad.message, "hint": bad.hint})


def expect_string(value: object, what: str) -> str:
    """`value` if it is a string; raises `BadValueError` naming `what` was expected."""
    if not isinstance(value, str):
        hint = "write it in quotes" if isinstance(value, int | float) else ""
        raise BadValueError(f"expected {what} as a string, found {shown(value)}", hint)
    return value


class Block(BaseModel):
    """A TOML table: unknown keys and wrong types are errors, and it never changes once validated.

    Subclasses override `resolve` (fill in values that depend on other keys), `faults` (rules between keys)
    and `is_idle` (keys without effect here, left out when the block is written down again).
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", hide_input_in_errors=True)

    def resolve(self) -> None:
        """Called once after the keys are valid; changes go through `settle`."""

    def faults(self) -> Iterable[Fault]:
        """Every rule between keys that is broken, with locations relative to this block."""
        return ()

    def is_idle(self, key: str) -> bool:
        """Whether `key` has no effect in this block, so that setting it would have been an error."""
        return False

    def is_set(self, key: str) -> bool:
        """Whether the file gives `key`, as opposed to its default."""
        return key in self.__pydantic_fields_set__

    def settle(self, **values: object) -> None:
        # Only `resolve` may call this: the block is not yet visible to anyone, so it is frozen all the same.
        for key, value in values.items():
            object.__setattr__(self, key, value)

    @model_validator(mode="after")
    def _check_rules(self, info: ValidationInfo) -> Self:
        self.resolve()
        if (info.context or {}).get("rules_later"):
            return self  # the caller asks every block for its faults once all of them exist
        if errors := [fault.error() for fault in self.faults()]:
            # pydantic merges the lines of a nested ValidationError, prefixed with this block's own location;
            # a plain ValueError could only point at the whole block.
            raise ValidationError.from_exception_data(type(self).__name__, errors)
        return self

    @model_serializer(mode="wrap")
    def _write(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # TOML has no null, and a key without effect would be refused when it is read back.
        written: dict[str, Any] = handler(self)
        return {key: value for key, value in written.items() if value is not None and not self.is_idle(key)}


class Parsed:
    """Metadata for `Annotated`: a plain validator with our own message, and the JSON Schema to go with it."""

    __slots__ = ()

    def parse(self, value: object) -> object:
        raise NotImplementedError

    def json_schema(self) -> dict[str, Any]:
        raise NotImplementedError

    def describe(self) -> str:
        """What is accepted, for the reference table."""
        raise NotImplementedError

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._parse_or_explain)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return self.json_schema()

    def _parse_or_explain(self, value: object) -> object:
        try:
            return self.parse(value)
        except BadValueError as bad:
            raise error_of(bad) from None


@dataclass(frozen=True)
class Range(Parsed):
    """A whole number between two bounds, both allowed."""

    low: int
    high: int = MAX_INT
    unit: str = ""
    """Plural noun for the message: `milliseconds`, `bytes`."""
    zero: str = ""
    """What 0 means where it lies outside the bounds and is allowed all the same: `off`, `unlimited`."""

    def describe(self) -> str:
        if self.high == MAX_INT:
            span = f"> {self.low - 1}" if self.low == 1 else f">= {self.low}"
        else:
            span = f"{self.low}..{self.high}"
        return f"0 = {self.zero}, or {span}" if self.zero else span

    def sentence(self) -> str:
        unit = f" of {self.unit}" if self.unit else ""
        text = f"a whole number{unit}"
        if self.high < MAX_INT:
            text += f" from {self.low} to {self.high}"
            return f"{text}, or 0 ({self.zero})" if self.zero else text
        if self.zero and self.low == 1:
            return f"{text} (0 = {self.zero})"
        return f"{text} above 0" if self.low == 1 else f"{text}, at least {self.low}"

    def parse(self, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            hint = ""
            if isinstance(value, str):
                hint = (
                    "write the number without quotes"
                    if value.strip().isdigit()
                    else (f"units are part of the key: give the number of {self.unit}" if self.unit else "")
                )
            raise BadValueError(f"expected {self.sentence()}, found {shown(value)}", hint)
        if not self.low <= value <= self.high and not (self.zero and value == 0):
            raise BadValueError(f"expected {self.sentence()}, found {shown(value)}")
        return value

    def json_schema(self) -> dict[str, Any]:
        span: dict[str, Any] = {"type": "integer", "minimum": self.low}
        if self.high != MAX_INT:
            span["maximum"] = self.high
        return {"anyOf": [{"const": 0}, span]} if self.zero else span


@dataclass(frozen=True)
class Fraction(Parsed):
    """A number between 0 and 1, both allowed."""

    def describe(self) -> str:
        return "0.0..1.0"

    def parse(self, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise BadValueError(f"expected a number from 0.0 to 1.0, found {shown(value)}")
        return float(value)

    def json_schema(self) -> dict[str, Any]:
        return {"type": "number", "minimum": 0, "maximum": 1}


@dataclass(frozen=True)
class Custom(Parsed):
    """A value with a parser of its own, which raises `BadValueError`."""

    what: str
    reader: Callable[[object], Any]
    schema: tuple[tuple[str, Any], ...] = (("type", "string"),)

    def describe(self) -> str:
        return self.what

    def parse(self, value: object) -> object:
        return self.reader(value)

    def json_schema(self) -> dict[str, Any]:
        return dict(self.schema)


@dataclass(frozen=True)
class Matches(Parsed):
    """A string of one form, described in words."""

    what: str
    """The noun phrase of the message: `a header name such as "x-user"`."""
    pattern: str
    hint: str = ""
    lower: bool = False
    """Upper-case letters are accepted and folded."""

    def describe(self) -> str:
        return self.what.removeprefix("a ").removeprefix("an ").removeprefix("the ")

    def parse(self, value: object) -> str:
        text = expect_string(value, self.what)
        if self.lower:
            text = text.lower()
        if re.fullmatch(self.pattern, text) is None:
            raise BadValueError(f"expected {self.what}, found {shown(value)}", self.hint)
        return text

    def json_schema(self) -> dict[str, Any]:
        return {"type": "string"} if self.lower else {"type": "string", "pattern": f"^(?:{self.pattern})$"}


TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
"""RFC 9110 5.6.2: what header and cookie names are made of."""


def _parse_name(value: object) -> str:
    text = expect_string(value, "a name")
    if not 1 <= len(text) <= 128 or " " in text or not text.isprintable():
        raise BadValueError(f"expected a name of 1 to 128 visible characters, found {shown(text)}")
    return text


Name = Annotated[str, Custom("name of at most 128 visible characters", _parse_name)]
HeaderName = Annotated[str, Matches('a header name such as "x-user"', TOKEN, lower=True)]
HeaderValue = Annotated[str, Matches("a header value of visible characters", r"[!-~](?:[ -~]*[!-~])?")]
UrlPath = Annotated[str, Matches('a path that begins with "/"', r"/[!-~]*")]


# -- addresses


_LABEL = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)")
_ADDRESS_FORM = 'expected an address such as "127.0.0.1:8080", "[::1]:8080" or "backend.example:8080"'


def _check_host_name(host: str, shown_text: str) -> None:
    labels = host.rstrip(".").split(".")
    if labels[-1].isdigit():
        raise BadValueError(
            f"{shown_text} is not a valid IPv4 address", "an IPv4 address is four numbers from 0 to 255"
        )
    if len(host) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        hint = ""
        if not host.isascii():
            hint = "write an international name in its ASCII form, which begins with xn--"
        elif host == "*":
            hint = 'to listen on every interface write "0.0.0.0:PORT" (IPv4) or "[::]:PORT" (IPv6)'
        elif "/" in host:
            hint = "leave out the scheme and the path: an address is a host and a port"
        raise BadValueError(f"{_ADDRESS_FORM}, found {shown_text}", hint)


def _is_service(text: str) -> bool:
    """Whether this has the form of RFC 2782: two labels with an underscore, then a domain."""
    service, _, rest = text.partition(".")
    protocol, _, domain = rest.partition(".")
    return service.startswith("_") and protocol.startswith("_") and domain not in ("", ".")


@dataclass(frozen=True, slots=True, order=True)
class Address:
    """A host (IPv4, IPv6 without brackets, or a name) and a port from 1 to 65535.

    Or, where `parse_backend` reads it, the name of a service (RFC 2782) and the port 0.
    """

    host: str
    port: int

    @classmethod
    def parse(cls, value: object) -> "Address":
        """Reads `host:port` or `[v6]:port`; raises `BadValueError`."""
        if isinstance(value, cls):
            return value
        text = expect_string(value, 'an address such as "127.0.0.1:8080"')
        found = shown(text)
        if not text:
            raise BadValueError(f"{_ADDRESS_FORM}, found {found}")
        if "://" in text:
            raise BadValueError(
                f"{_ADDRESS_FORM}, found {found}", "leave out the scheme: an address is a host and a port"
            )
        if text.startswith("["):
            inner, bracket, rest = text[1:].partition("]")
            if not bracket or (rest and not rest.startswith(":")):
                raise BadValueError(f"{_ADDRESS_FORM}, found {found}")
            try:
                host = str(IPv6Address(inner))
            except ValueError:
                raise BadValueError(f"{found} holds no valid IPv6 address between its brackets") from None
            separator, port = (":", rest[1:]) if rest else ("", "")
        else:
            host, separator, port = text.rpartition(":")
            if ":" in host or text.startswith("::"):
                raise BadValueError(
                    f"{_ADDRESS_FORM}, found {found}",
                    "an IPv6 address stands in brackets, so that its port can be told apart",
                )
        if not separator or not port:
            if not separator and _is_service(text):
                raise BadValueError(
                    f"{found} is a service, and only the address of a backend can be one",
                    "write a host and its port",
                )
            hint = f'add the port, as in "{text}:8080"' if text and not separator else ""
            raise BadValueError(f"{found} has no port", hint)
        if not host:
            raise BadValueError(
                f"{found} has no host",
                'to listen on every interface write "0.0.0.0:PORT" (IPv4) or "[::]:PORT" (IPv6)',
            )
        if not (port.isascii() and port.isdigit()) or len(port) > 5 or not 1 <= int(port) <= 65535:
            raise BadValueError(f"expected a port from 1 to 65535, found {shown(port)}")
        if not text.startswith("["):
            try:
                host = str(IPv4Address(host))
            except ValueError:
                _check_host_name(host, found)
                host = host.lower()
        return cls(host, int(port))

    @classmethod
    def parse_backend(cls, value: object) -> "Address":
        """Like `parse`, and reads the name of a service, which has no port: `_http._tcp.example.com`."""
        if not isinstance(value, str) or not _is_service(value.partition(":")[0]):
            return cls.parse(value)
        name, colon, _ = value.partition(":")
        if colon:
            raise BadValueError(
                f"{shown(value)} is a service, and a service's DNS records say its ports",
                f"remove the port: {shown(name)}",
            )
        _check_host_name(name, shown(value))
        return cls(name.lower(), 0)

    @property
    def is_srv(self) -> bool:
        """Whether this is the name of a service: hosts and ports are in its SRV records."""
        return self.port == 0

    @property
    def domain(self) -> str:
        """The host, or what a service belongs to: its name without the two labels in front."""
        return self.host.split(".", 2)[2] if self.is_srv else self.host

    @property
    def ip(self) -> IPv4Address | IPv6Address | None:
        """The host as a number; None if it is a name to be resolved."""
        try:
            return ip_address(self.host)
        except ValueError:
            return None

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it; a name other than `localhost` is never trusted to be."""
        ip = self.ip
        return self.host == "localhost" if ip is None else ip.is_loopback

    def __str__(self) -> str:
        if self.is_srv:
            return self.host
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            explained(cls.parse), serialization=core_schema.to_string_ser_schema()
        )

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"type": "string", "pattern": f"^{_HOST_AND_PORT}$"}


_HOST_AND_PORT = r"(\[[0-9A-Fa-f:.%a-z]+\]|[^:\[\]/]+):[0-9]{1,5}"

BackendAddress = Annotated[
    Address,
    Custom(
        "`host:port` or `_service._proto.name`",
        Address.parse_backend,
        (("type", "string"), ("pattern", rf"^({_HOST_AND_PORT}|_[^.:/]+\._[^.:/]+\.[^:/]+)$")),
    ),
    PlainSerializer(str),
]
"""An address, or the name of a service."""


def explained(parse: Callable[[object], Any]) -> Callable[[object], Any]:
    """`parse` for use as a pydantic validator: its `BadValueError` keeps message and hint."""

    def call(value: object) -> object:
        try:
            return parse(value)
        except BadValueError as bad:
            raise error_of(bad) from None

    return call


# -- networks


def _parse_network(value: object) -> IPv4Network | IPv6Network:
    if isinstance(value, IPv4Network | IPv6Network):
        return value
    text = expect_string(value, 'a network such as "10.0.0.0/8"')
    try:
        return ip_network(text)
    except ValueError:
        pass
    try:
        wider = ip_network(text, strict=False)
    except ValueError:
        raise BadValueError(
            f'expected a network such as "10.0.0.0/8" or "fd00::/8", found {shown(text)}'
        ) from None
    raise BadValueError(
        f"{shown(text)} is an address inside a network, not the network", f'the network is written "{wider}"'
    )


Network = Annotated[
    IPv4Network | IPv6Network,
    PlainValidator(explained(_parse_network)),
    PlainSerializer(str),
    WithJsonSchema({"type": "string"}),
]


# -- files


def parse_path(value: object, info: ValidationInfo) -> Path:
    """Reads the path of a file, relative to the directory in the context; raises what pydantic expects."""
    if isinstance(value, Path):
        text = str(value)
    elif isinstance(value, str):
        text = value
    else:
        raise error_of(BadValueError(f"expected the path of a file as a string, found {shown(value)}"))
    if not text or "\0" in text:
        raise error_of(BadValueError(f"expected the path of a file, found {shown(text)}"))
    directory = (info.context or {}).get("directory")
    return Path(directory, text) if directory is not None else Path(text)


FilePath = Annotated[
    Path, PlainValidator(parse_path), PlainSerializer(str), WithJsonSchema({"type": "string"})
]
"""A file; relative paths are taken from `context={"directory": ...}`, the directory of the config file."""


def before(parse: Callable[[object], Any]) -> BeforeValidator:
    """Metadata: `parse` runs first and may refuse with a `BadValueError`."""
    return BeforeValidator(explained(parse))
