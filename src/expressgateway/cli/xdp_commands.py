"""The commands about the XDP data plane: `xdp status`, `flows`, `detach`.

The first two ask the admin listener that the configuration names; `detach` also works where no gateway runs
any more. Exit codes: 0 done, 1 refused or failed, 2 usage.
"""

import json
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import click

from expressgateway.cli.admin_client import admin_address, api_path, call, printable, table_lines
from expressgateway.cli.run_command import DEFAULT_CONFIG

_Command = Callable[..., None]

MAX_FLOWS: Final = 10_000
_PIN_PATH: Final = "/sys/fs/bpf/expressgateway"  # as the schema has it; importing that takes a while

_JSON = click.option(
    "--json", "as_json", is_flag=True, help="Print the answer of the admin listener as it is."
)


def _place(command: _Command) -> _Command:
    for option in (
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


@click.group()
def xdp() -> None:
    """Show what the kernel forwards, and take the program away.

    The bearer token, if one is configured, is taken from the environment variable LB_ADMIN_TOKEN.
    """


@xdp.command()
@_place
@_JSON
def status(config: Path, admin: str | None, as_json: bool) -> None:
    """Show where the program is attached, and what it has forwarded."""
    address = admin_address(config, admin)
    answer = call(address, "GET", api_path("xdp"))
    if as_json:
        click.echo(json.dumps(answer, indent=2))
        return
    try:
        click.echo("\n".join(_page(answer)))
    except (KeyError, TypeError, AttributeError):
        raise click.ClickException(f"what answers at {address} shows no XDP: see --json") from None


def _page(shown: dict[str, Any]) -> Iterator[str]:
    yield f"XDP: {shown['state']}"
    if shown["fault"]:
        yield f"fault: {printable(shown['fault'])}"
    if shown["state"] in ("off", "detached"):
        return
    yield (
        f"flows: {shown['flows']} of at most {shown['max_flows']} in each family, "
        f"{shown['flows_ended']} ended, {shown['evictions']} made room"
    )
    yield ""
    yield from table_lines(
        ("INTERFACE", "MODE", "STATE"),
        [
            (
                printable(one["name"]),
                one["mode"] or "-",
                "attached" if one["is_attached"] else printable(one["fault"]) or "not attached",
            )
            for one in shown["interfaces"]
        ],
    )
    yield ""
    header = (
        "LISTENER",
        "ADDRESS",
        "PROTOCOL",
        "FORWARDING",
        "BACKENDS",
        "FLOWS",
        "PACKETS IN",
        "OUT",
        "BYTES IN",
    )
    yield from table_lines(
        (*header, "OUT"),
        [
            (
                printable(one["name"]),
                one["address"],
                one["protocol"],
                one["forwarding"],
                one["backends"],
                *_traffic(one),
            )
            for one in shown["listeners"]
        ],
    )
    yield ""
    yield from table_lines(
        ("POOL", "BACKEND", "FLOWS", "PACKETS IN", "OUT", "BYTES IN", "OUT"),
        [(printable(one["pool"]), printable(one["id"]), *_traffic(one)) for one in shown["backends"]],
    )
    for one in shown["left_out"]:
        yield f"left out: {printable(one['pool'])}/{printable(one['backend'])}: {printable(one['cause'])}"
    for one in shown["listeners"]:
        for what, name in (("left to user space", "passed"), ("dropped", "dropped")):
            if one[name]:
                yield f"{printable(one['name'])}: packets {what}: {_reasons(one[name])}"
    if shown["nobodys"]:
        yield f"nobody's packets, left to the kernel's stack: {_reasons(shown['nobodys'])}"


def _traffic(one: dict[str, Any]) -> tuple[object, ...]:
    return (one["flows"], one["in_packets"], one["out_packets"], one["in_bytes"], one["out_bytes"])


def _reasons(counts: dict[str, int]) -> str:
    return ", ".join(f"{printable(reason)} {count}" for reason, count in counts.items())


@xdp.command()
@click.option(
    "--limit",
    type=click.IntRange(1, MAX_FLOWS),
    default=100,
    show_default=True,
    help="How many at most.",
)
@_place
@_JSON
def flows(limit: int, config: Path, admin: str | None, as_json: bool) -> None:
    """List flows that the kernel knows, in no order."""
    address = admin_address(config, admin)
    answer = call(address, "GET", f"{api_path('xdp', 'flows')}?limit={limit}")
    if as_json:
        click.echo(json.dumps(answer, indent=2))
        return
    try:
        rows: list[tuple[object, ...]] = [
            (
                printable(one["listener"]),
                one["protocol"],
                one["client"],
                one["vip"],
                printable(one["backend"]) or "-",
                one["source"] or "-",
                one["state"],
                f"{one['idle_s']:.1f} s",
            )
            for one in answer["flows"]
        ]
        header = ("LISTENER", "PROTOCOL", "CLIENT", "TO", "BACKEND", "FROM", "STATE", "IDLE")
        click.echo("\n".join(table_lines(header, rows)) if rows else "there are no flows")
        if answer["total"] > len(rows):
            click.echo(f"and about {answer['total'] - len(rows)} more: see --limit")
    except (KeyError, TypeError, AttributeError, ValueError):
        raise click.ClickException(f"what answers at {address} shows no flows: see --json") from None


@xdp.command()
@_place
def detach(config: Path, admin: str | None) -> None:
    """Take the program away at once. Flows that the kernel forwards are cut off.

    A gateway that runs serves its listeners in user space from then on, until it reads its file again or is
    started. Where none runs any more, what it has left in the kernel is removed; that takes root.
    """
    from expressgateway.control.xdp_pins import XdpError, detach_left_behind

    pin_path = _pin_path(config)
    try:
        names = detach_left_behind(pin_path)
    except XdpError as error:
        if admin is None and not _is_asked(config):
            raise click.ClickException(str(error)) from None
        names = None
    if names is None:
        answer = call(admin_address(config, admin), "POST", api_path("xdp", "detach"), {})
        click.echo(f"{answer.get('state')}: {answer.get('note')}")
    elif names:
        click.echo(f"detached from {printable(', '.join(names))}; nothing is left below {pin_path}")
    else:
        click.echo(f"there is nothing below {pin_path}")


def _is_asked(config: Path) -> bool:
    """Whether a gateway that runs with this file could be asked."""
    try:
        admin_address(config, None)
    except click.ClickException:
        return False
    return True


def _pin_path(config: Path) -> Path:
    """Only this key is read: the rest of the file may be wrong by now."""
    try:
        with config.open("rb") as file:
            runtime = tomllib.load(file).get("runtime")
    except (OSError, ValueError):
        runtime = None
    given = runtime.get("xdp_pin_path") if isinstance(runtime, dict) else None
    return Path(config.absolute().parent, given if isinstance(given, str) else _PIN_PATH)
