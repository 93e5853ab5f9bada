"""The commands that show and change the backends of a running gateway: `backend list`, `add`, `remove`...

They ask the admin listener that the configuration names. Nothing is written to the configuration, and they
say so. Exit codes: 0 done, 1 refused or failed, 2 usage.
"""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import click

from expressgateway.cli.admin_client import admin_address, api_path, call, printable, table_lines
from expressgateway.cli.run_command import DEFAULT_CONFIG

_Command = Callable[..., None]


def _options(command: _Command) -> _Command:
    """The options that every command here has."""
    for option in (
        click.option(
            "--json", "as_json", is_flag=True, help="Print the answer of the admin listener as it is."
        ),
        click.option("--admin", metavar="HOST:PORT", help="The admin listener, if CONFIG does not name it."),
        click.option(
            "--config",
            metavar="CONFIG",
            type=click.Path(path_type=Path),
            default=DEFAULT_CONFIG,
            help=f"What the gateway runs with; {DEFAULT_CONFIG} if it is not given.",
        ),
    ):
        command = option(command)
    return command


_POOL = click.argument("pool")
_ID = click.argument("id_", metavar="ID")


@click.group()
def backend() -> None:
    """Show and change the backends of a running gateway.

    A pool is called by its name; the backends of a listener that names no pool are a pool of the listener's
    name. Changes are not written to the configuration: weights, additions and removals last until a reload,
    states until a restart.

    The bearer token, if one is configured, is taken from the environment variable LB_ADMIN_TOKEN.
    """


@backend.command(name="list")
@click.argument("pool", required=False)
@_options
def list_(pool: str | None, config: Path, admin: str | None, as_json: bool) -> None:
    """Show the backends of POOL, or of every pool."""
    address = admin_address(config, admin)
    shown = call(address, "GET", api_path("pools") if pool is None else api_path("pools", pool))
    if as_json:
        click.echo(json.dumps(shown, indent=2))
        return
    pools = shown.get("pools") if pool is None else [shown]
    try:
        click.echo("\n\n".join("\n".join(_page(each)) for each in pools or ()) or "there are no pools")
    except (KeyError, TypeError, AttributeError):
        raise click.ClickException(f"what answers at {address} shows no pools: see --json") from None


@backend.command()
@_POOL
@click.argument("address")
@click.option("--id", "id", help="Its identity, if not ADDRESS.")
@click.option("--weight", type=click.IntRange(0, 65535), help="Its share of the work; 1 if it is not given.")
@click.option("--protocol", help="What it speaks: tcp, h1, h2 or h3.")
@click.option("--tls", is_flag=True, default=None, help="Speak TLS to it.")
@click.option("--tls-ca-path", type=click.Path(), help="CA bundle that signs its certificate.")
@click.option("--tls-verify-hostname", help="Name its certificate must have, if not the host of ADDRESS.")
@click.option("--no-tls-verify-peer", is_flag=True, help="Do not check its certificate.")
@click.option("--tls-cert-path", type=click.Path(), help="Certificate shown to it.")
@click.option("--tls-key-path", type=click.Path(), help="Private key of --tls-cert-path.")
@click.option("--send-proxy", help="Begin connections with a PROXY header: v1 or v2.")
@_options
def add(
    pool: str,
    address: str,
    no_tls_verify_peer: bool,
    config: Path,
    admin: str | None,
    as_json: bool,
    **given: object,
) -> None:
    """Add the backend at ADDRESS (host:port) to POOL.

    Files are read by the gateway, with its rights.
    """
    table = {"address": address} | {key: value for key, value in given.items() if value is not None}
    if no_tls_verify_peer:
        table["tls_verify_peer"] = False
    for key, value in table.items():
        if key.endswith("_path"):
            table[key] = str(Path(str(value)).absolute())  # the gateway's directory is another one
    answer = call(admin_address(config, admin), "POST", api_path("pools", pool, "backends"), table)
    _tell(f"pool {pool}: {given.get('id') or address} is added", answer, as_json)


@backend.command()
@_POOL
@_ID
@_options
def remove(pool: str, id_: str, config: Path, admin: str | None, as_json: bool) -> None:
    """Remove a backend from POOL; its exchanges may end."""
    answer = call(admin_address(config, admin), "DELETE", api_path("pools", pool, "backends", id_))
    _tell(f"pool {pool}: {id_} is removed", answer, as_json)


@backend.command()
@_POOL
@_ID
@click.argument("weight", type=click.IntRange(0, 65535))
@_options
def weight(pool: str, id_: str, weight: int, config: Path, admin: str | None, as_json: bool) -> None:
    """Set the share of the work that a backend of POOL gets. 0: no new work."""
    answer = _patch(pool, id_, {"weight": weight}, config, admin)
    _tell(f"pool {pool}: the weight of {id_} is {weight}", answer, as_json)


@backend.command()
@_POOL
@_ID
@_options
def drain(pool: str, id_: str, config: Path, admin: str | None, as_json: bool) -> None:
    """Give a backend of POOL no new work; what is bound to it goes on."""
    _set_state(pool, id_, "draining", config, admin, as_json)


@backend.command()
@_POOL
@_ID
@_options
def enable(pool: str, id_: str, config: Path, admin: str | None, as_json: bool) -> None:
    """Give a backend of POOL work again, as far as it is well."""
    _set_state(pool, id_, "ready", config, admin, as_json)


@backend.command()
@_POOL
@_ID
@_options
def disable(pool: str, id_: str, config: Path, admin: str | None, as_json: bool) -> None:
    """Give a backend of POOL nothing at all."""
    _set_state(pool, id_, "disabled", config, admin, as_json)


def _set_state(pool: str, id_: str, state: str, config: Path, admin: str | None, as_json: bool) -> None:
    answer = _patch(pool, id_, {"state": state}, config, admin)
    _tell(f"pool {pool}: {id_} is {state}", answer, as_json)


def _patch(pool: str, id_: str, body: dict[str, object], config: Path, admin: str | None) -> dict[str, Any]:
    return call(admin_address(config, admin), "PATCH", api_path("pools", pool, "backends", id_), body)


def _tell(sentence: str, answer: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(answer, indent=2))
        return
    unchanged = "; nothing changed by it" if answer.get("result") == "unchanged" else ""
    click.echo(f"{sentence}{unchanged}; configuration {answer.get('version')} is in force")
    if note := answer.get("note"):
        click.echo(note)
    if warning := answer.get("warning"):
        click.echo(f"warning: {warning}", err=True)


# -- the list

_HEADER: Final = ("ID", "ADDRESS", "WEIGHT", "STATE", "SINCE", "IN FLIGHT", "OPEN", "REQUESTS", "CAUSE")


def _page(pool: dict[str, Any]) -> Iterator[str]:
    panic = "; too few are well, so all are used" if pool["panic"] else ""
    yield f"pool {pool['name']}, {pool['policy']}{panic}"
    if warning := pool.get("warning"):
        yield f"warning: {warning}"
    if changes := pool.get("changes"):
        yield f"run-time changes, not in the file: {', '.join(changes)}"
    rows: list[tuple[object, ...]] = []
    for each in pool["backends"]:
        rows.append(_row(each, each["weight"]))
        rows += [_row(address, "", "  ") for address in each.get("resolved", ())]
    yield from table_lines(_HEADER, rows)


def _row(shown: dict[str, Any], weight: object, indent: str = "") -> tuple[object, ...]:
    return (
        indent + shown["id"],
        shown["address"],
        weight,
        shown["state"],
        _ago(shown["since"]),
        shown["in_flight"],
        shown["open"],
        shown["requests"],
        printable(shown["cause"]),
    )


def _ago(since: float | None) -> str:
    if since is None:
        return "-"
    seconds = max(0, int(time.time() - since))  # noqa: TID251 - compared with another process's wall clock
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"
