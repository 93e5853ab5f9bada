"""The commands that concern a running gateway: `run`, `status`, `reload` and `demo`.

`status` and `reload` ask the admin listener that the configuration names; `reload` then sends SIGHUP to the
process found there and waits for its answer.
"""

import http.client
import json
import os
import signal
import sys
import time
import tomllib
from pathlib import Path
from typing import Any, Final, NoReturn

import click

from expressgateway.control.failures import EXIT_CONFIG, EXIT_FAILURE, EXIT_OK

DEFAULT_CONFIG: Final = "config/default.toml"
TOKEN_VARIABLE: Final = "LB_ADMIN_TOKEN"

_ASK_S: Final = 5.0
_POLL_S: Final = 0.05
_RELOAD_S: Final = 60.0

_CONFIG = click.argument("config", type=click.Path(path_type=Path), default=DEFAULT_CONFIG)
_ADMIN = click.option("--admin", metavar="HOST:PORT", help="The admin listener, if CONFIG does not name it.")
_INSECURE = click.option(
    "--insecure-key-permissions",
    is_flag=True,
    help="Key files that group or others can read are a warning, not an error.",
)


@click.command()
@_CONFIG
@_INSECURE
def run(config: Path, insecure_key_permissions: bool) -> None:
    """Run the gateway with CONFIG (config/default.toml) until a signal ends it.

    SIGTERM and SIGINT drain and stop, a second one stops at once; SIGHUP reloads CONFIG.
    """
    from expressgateway.control.supervisor import Options
    from expressgateway.control.supervisor import run as supervise

    sys.exit(supervise(config, Options(insecure_key_permissions=insecure_key_permissions)))


@click.command()
@click.option("--port", type=click.IntRange(1, 65000), help="First of the consecutive ports to use.")
def demo(port: int | None) -> None:
    """Run a gateway with embedded backends, and print commands to try it with."""
    from expressgateway.demo.app import run_demo

    sys.exit(run_demo(port))


@click.command()
@_CONFIG
@_ADMIN
@click.option("--json", "as_json", is_flag=True, help="Print the answer of the admin listener as it is.")
def status(config: Path, admin: str | None, as_json: bool) -> None:
    """Show what the gateway that runs with CONFIG is doing.

    The bearer token, if one is configured, is taken from the environment variable LB_ADMIN_TOKEN.
    """
    shown = _ask(_admin_address(config, admin))
    click.echo(json.dumps(shown, indent=2) if as_json else _page(shown))


@click.command()
@_CONFIG
@_ADMIN
def reload(config: Path, admin: str | None) -> None:
    """Have the gateway that runs with CONFIG read it again, and tell the result.

    Sends SIGHUP to the process that the admin listener names, so it needs the rights of that process. The
    bearer token, if one is configured, is taken from the environment variable LB_ADMIN_TOKEN. Exit codes: 0
    applied, 1 refused or failed, 78 invalid configuration; unless it is 0 the old configuration runs on.
    """
    address = _admin_address(config, admin)
    before = _ask(address)
    _check_same_file(config, before)
    wanted = before["reload"]["requested"] + 1
    try:
        os.kill(before["pid"], signal.SIGHUP)
    except ProcessLookupError:
        _fail(f"there is no process {before['pid']} here: the gateway at {address} runs elsewhere")
    except PermissionError:
        _fail(f"permission denied to signal process {before['pid']}: run this as its user, or as root")
    deadline = time.monotonic() + _RELOAD_S
    while (after := _ask(address))["reload"]["finished"] < wanted:
        if after["pid"] != before["pid"] or after["state"] != "serving":
            _fail("the gateway is stopping: nothing was reloaded")
        if time.monotonic() > deadline:
            _fail(f"no result within {_RELOAD_S:.0f} seconds: see the gateway's log")
        time.sleep(_POLL_S)
    result = after["reload"]["last_result"]
    is_success = result in ("applied", "unchanged")
    click.echo("\n".join(after["reload"]["last_report"]), err=not is_success)
    click.echo(f"reload {result}: configuration {after['config']['version']} is in force", err=not is_success)
    sys.exit(EXIT_OK if is_success else EXIT_CONFIG if result == "invalid" else EXIT_FAILURE)


def _fail(sentence: str) -> NoReturn:
    raise click.ClickException(sentence)


def _check_same_file(config: Path, shown: dict[str, Any]) -> None:
    running = Path(shown["config"]["path"])
    try:
        same = running.samefile(config)
    except OSError:
        same = running == config.absolute()
    if not same:
        _fail(f"the gateway runs with {running}, not with {config}")


def _admin_address(config: Path, given: str | None) -> str:
    """Where the admin listener is. Only this key is read: the rest of the file may name unreadable keys."""
    if given is not None:
        return given
    try:
        with config.open("rb") as file:
            document = tomllib.load(file)
    except OSError as error:
        raise click.ClickException(f"{config} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise click.ClickException(
            f"{config} is not valid TOML ({error}); `expressgateway check {config}` says more."
        ) from None
    observability = document.get("observability")
    bind = observability.get("metrics_bind") if isinstance(observability, dict) else None
    if not isinstance(bind, str):
        raise click.ClickException(
            f"{config} has no observability.metrics_bind, so its gateway cannot be asked; "
            "a reload can be had with kill -HUP and the log"
        )
    return bind


def _ask(address: str) -> dict[str, Any]:
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    # A listener on every interface is asked on this machine's own.
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    headers = {}
    if token := os.environ.get(TOKEN_VARIABLE):
        headers["Authorization"] = f"Bearer {token}"
    try:
        connection = http.client.HTTPConnection(host, int(port), timeout=_ASK_S)
        try:
            connection.request("GET", "/api/v1/status", headers=headers)
            response = connection.getresponse()
            body = response.read()
        finally:
            connection.close()
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise click.ClickException(f"the admin listener at {address} does not answer: {error}") from None
    if response.status == 401:
        raise click.ClickException(f"the admin listener wants its token in {TOKEN_VARIABLE}")
    try:
        shown = json.loads(body) if response.status == 200 else None
    except ValueError:
        shown = None
    if not isinstance(shown, dict) or "reload" not in shown:
        raise click.ClickException(
            f"what answers at {address} is no ExpressGateway (status {response.status})"
        )
    return shown


def _page(shown: dict[str, Any]) -> str:
    config, last = shown["config"], shown["reload"]["last_result"]
    lines = [
        f"{shown['state']}, pid {shown['pid']}, version {shown['version']}, up {shown['uptime_s']:.0f} s",
        f"configuration {config['version']} from {config['path']}{f', last reload {last}' if last else ''}",
        "",
        *_table(
            ("LISTENER", "PROTOCOL", "ADDRESS", "OPEN"),
            [(one["name"], one["protocol"], one["bound"], one["open"]) for one in shown["listeners"]],
        ),
        "",
        *_table(
            ("WORKER", "PID", "STATE", "RESTARTS"),
            [(one["index"], one["pid"] or "-", one["state"], one["restarts"]) for one in shown["workers"]],
        ),
    ]
    return "\n".join(lines)


def _table(header: tuple[str, ...], rows: list[tuple[object, ...]]) -> list[str]:
    cells = [header, *(tuple(map(str, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
