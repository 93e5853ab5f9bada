"""The command `status`: what the gateway does, once or again every second.

It listens to the same events as the dashboard (`control/admin/live.py`). In a terminal `--watch` draws the
same place again; anywhere else it prints a line a second, for logs and pipes. Exit codes: 0 shown, or ended
by Ctrl-C; 1 the gateway does not answer, or does not any more; 2 usage.
"""

import http.client
import json
import os
import signal
import sys
from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import click

from expressgateway.cli.admin_client import (
    TOKEN_VARIABLE,
    admin_address,
    api_path,
    authorization,
    call,
    place,
)
from expressgateway.cli.run_command import DEFAULT_CONFIG
from expressgateway.cli.status_page import line, page

_SILENCE_S: Final = 12.0  # the gateway says something at least every five seconds
_FIRST_PICTURES: Final = 4
"""Rates need two looks at the counters, so the first pictures may have none; a gateway that is ending never
has. After so many they are shown without."""
_UNKNOWN_SIZE: Final = (80, 24)
_MAX_LINE_BYTES: Final = 16 * 1024 * 1024

# Terminal control (ECMA-48): another screen and no cursor while it is drawn upon; then what was there before.
_ENTER: Final = "\x1b[?1049h\x1b[?25l"
_LEAVE: Final = "\x1b[?25h\x1b[?1049l"
_HOME: Final = "\x1b[H"
_REST_OF_LINE: Final = "\x1b[K"
_REST_OF_SCREEN: Final = "\x1b[J"


@click.command()
@click.argument("config", type=click.Path(path_type=Path), default=DEFAULT_CONFIG)
@click.option("--admin", metavar="HOST:PORT", help="The admin listener, if CONFIG does not name it.")
@click.option("--watch", is_flag=True, help="Show it again every second, until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="Print the answer of the admin listener as it is.")
def status(config: Path, admin: str | None, watch: bool, as_json: bool) -> None:
    """Show what the gateway that runs with CONFIG is doing.

    Rates are those of the last seconds. The bearer token, if one is configured, is taken from the environment
    variable LB_ADMIN_TOKEN.
    """
    address = admin_address(config, admin)
    if watch:
        _watch(address, as_json)
        return
    if as_json:
        shown = call(address, "GET", api_path("status"))
        if "reload" not in shown:
            raise click.ClickException(f"what answers at {address} is no ExpressGateway")
        click.echo(json.dumps(shown, indent=2))
        return
    picture: dict[str, Any] = {}
    with closing(_pictures(address)) as pictures:
        for number, picture in enumerate(pictures, 1):
            if picture["measured_s"] is not None or number == _FIRST_PICTURES:
                break
    click.echo("\n".join(page(picture)))


def _watch(address: str, as_json: bool) -> None:
    before = signal.signal(signal.SIGTERM, _interrupt)  # or it would leave a terminal without a cursor
    try:
        with closing(_pictures(address)) as pictures:
            if as_json:
                for picture in pictures:
                    _print(json.dumps(picture))
            elif sys.stdout.isatty():
                _redraw(pictures)
            else:
                for picture in pictures:
                    _print(line(picture))
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _redraw(pictures: Iterator[dict[str, Any]]) -> None:
    try:
        sys.stdout.write(_ENTER)
        for picture in pictures:
            columns, rows = os.get_terminal_size(sys.stdout.fileno())  # it may change meanwhile
            if not (columns and rows):
                columns, rows = _UNKNOWN_SIZE
            lines = page(picture, columns, colours=True)
            if len(lines) >= rows:
                hidden = len(lines) - max(rows - 2, 0)
                lines = [*lines[: max(rows - 2, 0)], f"... {hidden} more lines: the terminal is too low"]
            text = "".join(f"{each}{_REST_OF_LINE}\n" for each in lines)
            sys.stdout.write(f"{_HOME}{text}{_REST_OF_SCREEN}")
            sys.stdout.flush()
    finally:
        sys.stdout.write(_LEAVE)
        sys.stdout.flush()


def _pictures(address: str) -> Generator[dict[str, Any], None, None]:
    """A picture a second. Raises `ClickException` when the gateway does not answer, or not any more."""
    host, port = place(address)
    headers = authorization()
    connection = http.client.HTTPConnection(host, port, timeout=_SILENCE_S)
    with closing(connection):
        try:
            connection.request("GET", api_path("events"), headers=headers)
            response = connection.getresponse()
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise click.ClickException(f"the admin listener at {address} does not answer: {error}") from None
        with response:
            _check(response, address)
            try:
                yield from _states(response)
            except (OSError, ValueError, http.client.HTTPException) as error:
                raise click.ClickException(
                    f"the gateway at {address} does not answer any more: {error}"
                ) from None
    raise click.ClickException(
        f"the gateway at {address} does not answer any more: it has stopped, or reloaded"
    )


def _check(response: http.client.HTTPResponse, address: str) -> None:
    if response.status == 401:
        raise click.ClickException(f"the admin listener wants its token in {TOKEN_VARIABLE}")
    if response.status == 503:
        raise click.ClickException(f"{address}: {response.read(1000).decode(errors='replace').strip()}")
    if response.status != 200 or response.headers.get_content_type() != "text/event-stream":
        raise click.ClickException(
            f"what answers at {address} is no ExpressGateway, or an older one (status {response.status})"
        )


def _states(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The data of every ``state`` event. Raises `ValueError` if it is no JSON object."""
    name = ""
    while row := response.readline(_MAX_LINE_BYTES):
        field, _, value = row.decode().rstrip("\r\n").partition(": ")
        if field == "event":
            name = value
        elif field == "data" and name == "state":
            picture = json.loads(value)
            if not isinstance(picture, dict):
                raise ValueError("a state is no object")
            yield picture
