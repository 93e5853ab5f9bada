"""The commands that show a running gateway and act upon it as a whole: `reload`, `upgrade`, `drain`,
`config`, `certificates` and `log-level`.

They ask the admin listener that the configuration names, and need no rights but its token; `upgrade` sends a
signal besides.
"""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import click

from expressgateway.cli.admin_client import (
    admin_address,
    api_path,
    ask,
    call,
    check_same_file,
    printable,
    refusal,
    table_lines,
)
from expressgateway.cli.run_command import DEFAULT_CONFIG
from expressgateway.control.failures import EXIT_CONFIG, EXIT_FAILURE
from expressgateway.observe.logs import LEVELS

_Command = Callable[..., None]

UPGRADE_S: Final = 120.0
"""For an upgrade to be over: longer than the gateway waits for the new process."""
_POLL_S: Final = 0.1


def _place(command: _Command) -> _Command:
    """The argument and the option that say which gateway is meant."""
    option = click.option(
        "--admin", metavar="HOST:PORT", help="The admin listener, if CONFIG does not name it."
    )
    return click.argument("config", type=click.Path(path_type=Path), default=DEFAULT_CONFIG)(option(command))


_JSON = click.option(
    "--json", "as_json", is_flag=True, help="Print the answer of the admin listener as it is."
)


@click.command()
@_place
def reload(config: Path, admin: str | None) -> None:
    """Have the gateway that runs with CONFIG read it again, and tell the plan and the result.

    The bearer token, if one is configured, is taken from the environment variable LB_ADMIN_TOKEN. Exit
    codes: 0 applied, 1 refused or failed, 78 invalid configuration; unless it is 0 the old one runs on.
    """
    address = admin_address(config, admin)
    check_same_file(config, address)
    status, answer = ask(address, "POST", api_path("reload"), {})
    result = answer.get("result")
    if not isinstance(result, str):
        raise click.ClickException(f"nothing was reloaded: {refusal(status, answer)}")
    is_success = status == 200
    for line in answer.get("plan" if is_success else "details") or ():
        click.echo(line, err=not is_success)
    click.echo(f"reload {result}: configuration {answer.get('version')} is in force", err=not is_success)
    if not is_success:
        sys.exit(EXIT_CONFIG if result == "invalid" else EXIT_FAILURE)


@click.command()
@_place
def upgrade(config: Path, admin: str | None) -> None:
    """Have a new process take over from the gateway that runs with CONFIG, as SIGUSR2 does.

    It runs what is installed now, with CONFIG as it is now. Nobody is refused meanwhile; the old process
    drains. Has to run on the gateway's machine, as its user or as root. Exit codes: 0 the new one serves, 1
    it does not, and the old one runs on.
    """
    address = admin_address(config, admin)
    check_same_file(config, address)
    old, failures, _ = _upgrade_state(call(address, "GET", api_path("status")), address)
    _signal(old)
    ends = time.monotonic() + UPGRADE_S
    while time.monotonic() < ends:
        time.sleep(_POLL_S)
        with contextlib.suppress(click.ClickException):  # between the two nobody answers for a moment
            shown = call(address, "GET", api_path("status"))
            pid, failed, reason = _upgrade_state(shown, address)
            if pid == old and failed > failures:
                click.echo(f"the upgrade failed, process {old} serves: {printable(reason)}", err=True)
                sys.exit(EXIT_FAILURE)
            if pid != old and shown.get("state") == "serving":
                click.echo(f"process {pid} serves, process {old} drains")
                return
    raise click.ClickException(
        f"nothing has become of the upgrade within {UPGRADE_S:.0f} seconds; the gateway's log says more"
    )


def _upgrade_state(shown: dict[str, Any], address: str) -> tuple[int, int, str]:
    """The process, how many upgrades have failed in it, and why the last one did."""
    try:
        told = shown["upgrade"]
        return int(shown["pid"]), int(told["finished"]), str(told["last_failure"])
    except (KeyError, TypeError, ValueError):
        raise click.ClickException(f"what answers at {address} cannot be upgraded") from None


def _signal(pid: int) -> None:
    """Raises `ClickException`."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        command = b""
    if b"expressgateway" not in command:  # whoever else has that number would be killed by the signal
        raise click.ClickException(
            f"the gateway is process {pid}, but not on this machine, or not to be seen from here: run the "
            "command where it runs, in a container inside of it"
        )
    try:
        os.kill(pid, signal.SIGUSR2)
    except ProcessLookupError:
        raise click.ClickException(f"the gateway, process {pid}, is gone") from None
    except PermissionError:
        raise click.ClickException(
            f"process {pid} is another user's: run the command as root or as the user of the gateway"
        ) from None


@click.command()
@_place
def drain(config: Path, admin: str | None) -> None:
    """Have the gateway that runs with CONFIG drain and stop, as SIGTERM does."""
    address = admin_address(config, admin)
    check_same_file(config, address)
    answer = call(address, "POST", api_path("drain"), {})
    click.echo(f"{answer.get('state')}: {answer.get('note')}")


@click.command(name="config")
@_place
@_JSON
def show_config(config: Path, admin: str | None, as_json: bool) -> None:
    """Print the configuration that is in force, with its defaults and without its secrets, as TOML."""
    address = admin_address(config, admin)
    answer = call(address, "GET", api_path("config"))
    if as_json:
        click.echo(json.dumps(answer, indent=2))
        return
    # Imported here: it takes a while, and the other commands do without.
    from expressgateway.config.render import toml_of

    try:
        click.echo(f"# configuration {answer['version']}, from {printable(answer['path'])}")
        for pool, changes in answer["changes"].items():
            click.echo(f"# pool {printable(pool)}, not in the file: {printable(', '.join(changes))}")
        click.echo(toml_of(answer["config"]), nl=False)
    except (KeyError, TypeError, AttributeError):
        raise click.ClickException(f"what answers at {address} shows no configuration") from None


@click.command()
@_place
@_JSON
def certificates(config: Path, admin: str | None, as_json: bool) -> None:
    """Show the certificates in use."""
    address = admin_address(config, admin)
    answer = call(address, "GET", api_path("certificates"))
    rows = answer.get("certificates")
    if as_json:
        click.echo(json.dumps(answer, indent=2))
    elif not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise click.ClickException(f"what answers at {address} shows no certificates")
    elif not rows:
        click.echo("there are no certificates")
    else:
        keys = tuple(dict.fromkeys(key for row in rows for key in row))
        cells: list[tuple[object, ...]] = [tuple(_cell(row.get(key)) for key in keys) for row in rows]
        header = tuple(printable(key.replace("_", " ").upper()) for key in keys)
        click.echo("\n".join(table_lines(header, cells)))


@click.command(name="log-level")
@click.argument("level", type=click.Choice(LEVELS))
@_place
def log_level(level: str, config: Path, admin: str | None) -> None:
    """Set what the gateway that runs with CONFIG logs, in all its processes, until it ends."""
    answer = call(admin_address(config, admin), "PATCH", api_path("log"), {"level": level})
    click.echo(f"the log's level is {answer.get('level')}")


def _cell(value: Any) -> str:  # noqa: ANN401 - what JSON holds
    if value is None:
        return "-"
    return printable(", ".join(map(str, value)) if isinstance(value, list) else value)
