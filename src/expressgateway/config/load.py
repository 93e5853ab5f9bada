"""From a file to a configuration that can be used, or to everything that is wrong with it.

Introduces `Loaded`. Loading has no side effects: it reads the file and the files it names, and binds, creates
and logs nothing. (Code that it names is tried in a process of its own: see `policies`.)
"""

import grp
import pwd
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from expressgateway.config.blocks import MAX_HEADER_DEADLINE_MS
from expressgateway.config.diagnose import (
    ConfigError,
    Diagnostic,
    Problem,
    Source,
    in_order,
    syntax_diagnostic,
)
from expressgateway.config.material import Material, gather
from expressgateway.config.policies import policy_problems
from expressgateway.config.pools import nearest
from expressgateway.config.schema import Config
from expressgateway.config.validate import validate
from expressgateway.config.values import Loc, shown

MAX_CONFIG_BYTES: Final = 16 * 1024 * 1024
"""The largest configuration file read."""

MAX_DEPTH: Final = 64
"""Levels of tables and arrays; the schema has about ten."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A valid configuration with all that was read for it."""

    config: Config
    path: Path
    warnings: tuple[Diagnostic, ...] = ()
    material: Material = field(default_factory=Material)


def load(path: Path, *, insecure_key_permissions: bool = False) -> Loaded:
    """Reads and checks a configuration file and every file it names.

    Raises `ConfigError` with all errors (and warnings) in the order of the file. With
    `insecure_key_permissions` a key that group or others can read is a warning.
    """
    source = _read(path)
    document = _parse(source)
    verdict = validate(document, path.absolute().parent)
    problems = list(verdict.problems)
    material = Material()
    if verdict.config is not None:
        material, found = gather(verdict.config, insecure_key_permissions=insecure_key_permissions)
        found.extend(_account_problems(verdict.config))
        found.extend(policy_problems(verdict.config))
        if not problems:
            found.extend(_idle_problems(verdict.config))
        moved = (replace(problem, loc=verdict.remainder.original(problem.loc)) for problem in found)
        problems.extend(problem for problem in moved if not verdict.is_blamed(problem.loc))
    diagnostics = in_order(source.diagnostic(problem) for problem in problems)
    if verdict.config is None or any(diagnostic.severity == "error" for diagnostic in diagnostics):
        raise ConfigError(diagnostics)
    return Loaded(verdict.config, path, diagnostics, material)


def _read(path: Path) -> Source:
    try:
        if path.exists() and not path.is_file():
            raise ConfigError((_about_file(path, "not a regular file"),))
        with path.open("rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(
            (
                _about_file(
                    path, "the file does not exist", "`expressgateway init FILE` writes one to start from"
                ),
            )
        ) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError((_about_file(path, f"the file cannot be read: {reason}"),)) from None
    if len(data) > MAX_CONFIG_BYTES:
        raise ConfigError((_about_file(path, f"the file is larger than {MAX_CONFIG_BYTES >> 20} MiB"),))
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        before = data[: error.start]
        source = Source(str(path), data.decode(errors="replace"))
        column = len(before.rpartition(b"\n")[2].decode(errors="replace")) + 1
        line = before.count(b"\n") + 1
        raise ConfigError(
            (source.syntax_error("not valid UTF-8", line, column, "save the file in the encoding UTF-8"),)
        ) from None
    source = Source(str(path), text)
    if text.startswith("\ufeff"):
        raise ConfigError(
            (
                source.syntax_error(
                    "the file begins with a byte order mark", 1, 1, "save the file as UTF-8 without BOM"
                ),
            )
        )
    return source


def _about_file(path: Path, message: str, hint: str = "") -> Diagnostic:
    return Diagnostic(str(path), 0, 0, "", "", message, hint)


def _parse(source: Source) -> dict[str, Any]:
    too_deep = _about_file(Path(source.name), "arrays or tables are nested too deeply")
    try:
        document = tomllib.loads(source.text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError((syntax_diagnostic(source, error),)) from None
    except RecursionError:
        raise ConfigError((too_deep,)) from None
    except ValueError as error:
        # dates that do not exist and integers of thousands of digits escape tomllib as plain ValueErrors
        raise ConfigError((_about_file(Path(source.name), f"not valid TOML: {error}"),)) from None
    # dotted keys nest without recursion in tomllib, but not in those who walk the result
    level: list[Any] = [document]
    for _ in range(MAX_DEPTH):
        level = [inner for value in level for inner in _inside(value)]
        if not level:
            return document
    raise ConfigError((too_deep,))


def _inside(value: object) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _account_problems(config: Config) -> Iterator[Problem]:
    """Accounts that this machine does not have."""
    runtime = config.runtime
    if runtime.user is not None and not _is_known(pwd.getpwnam, runtime.user):
        users = [entry.pw_name for entry in pwd.getpwall()]
        yield Problem(
            ("runtime", "user"),
            f"there is no user {shown(runtime.user)} on this machine",
            nearest(runtime.user, users),
        )
    if runtime.group is not None and not _is_known(grp.getgrnam, runtime.group):
        groups = [entry.gr_name for entry in grp.getgrall()]
        yield Problem(
            ("runtime", "group"),
            f"there is no group {shown(runtime.group)} on this machine",
            nearest(runtime.group, groups),
        )


def _idle_problems(config: Config) -> Iterator[Problem]:
    """What is allowed but probably not meant."""
    for index, pool in config.unused_pools():
        yield Problem(
            ("pools", index, "name"),
            f"no listener uses the pool {shown(pool.name)}",
            "refer to it with pool, or remove it",
            severity="warning",
        )
    deadline_ms = config.runtime.watchdog.header_deadline_ms
    for index, listener in enumerate(config.listeners):
        http = listener.http
        if http.is_set("header_timeout_ms") and http.header_timeout_ms > deadline_ms:
            yield Problem(
                ("listeners", index, "http", "header_timeout_ms"),
                f"{http.header_timeout_ms} ms have no effect: the {deadline_ms} ms of "
                "runtime.watchdog.header_deadline_ms end first",
                f"lower it, or set header_deadline_ms = {http.header_timeout_ms} in [runtime.watchdog]"
                if http.header_timeout_ms <= MAX_HEADER_DEADLINE_MS
                else "lower it",
                severity="warning",
            )
    yield from _xdp_problems(config)
    if config.observability.metrics_bind is None and config.admin.api_token_hash is not None:
        yield Problem(
            ("admin", "api_token_hash"),
            "there is no admin listener to protect",
            "set observability.metrics_bind, or remove the key",
            severity="warning",
        )


def _xdp_problems(config: Config) -> Iterator[Problem]:
    asking: list[Loc] = [
        ("listeners", index, "xdp") for index, listener in enumerate(config.listeners) if listener.xdp
    ]
    if config.passthrough is not None and config.passthrough.xdp:
        asking.append(("passthrough", "xdp"))
    if config.runtime.xdp_enabled:
        if not asking:
            yield Problem(
                ("runtime", "xdp_enabled"),
                "no listener has xdp, so the kernel forwards nothing",
                "set xdp = true in a listener",
                severity="warning",
            )
        return
    for loc in asking:
        yield Problem(
            loc,
            "runtime.xdp_enabled is false: it is served in user space",
            "set xdp_enabled = true and xdp_interface in [runtime]",
            severity="warning",
        )


def _is_known(look_up: Any, name: str) -> bool:  # noqa: ANN401 - two functions with different results
    try:
        look_up(name)
    except KeyError:
        return False
    return True
