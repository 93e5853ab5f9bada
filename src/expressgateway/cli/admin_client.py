"""The client of the admin API for every command: where the listener is, one request, and what it answers.

Whatever goes wrong ends the command with a sentence and exit code 1.
"""

import http.client
import json
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import click

TOKEN_VARIABLE: Final = "LB_ADMIN_TOKEN"
WAIT_S: Final = 45.0
"""For a write. Longer than the gateway waits for its workers: its own answer says more than ours."""
READ_WAIT_S: Final = 10.0
MAX_ANSWER_BYTES: Final = 64 * 1024 * 1024


def api_path(*names: str) -> str:
    """A path of the API; names may hold any character."""
    return "/".join(("/api/v1", *(quote(name, safe="") for name in names)))


def call(address: str, method: str, path: str, body: Mapping[str, object] | None = None) -> dict[str, Any]:
    """The JSON object answered with a status of success. Raises `ClickException`."""
    status, answer = ask(address, method, path, body)
    if not 200 <= status < 300:
        raise click.ClickException(refusal(status, answer))
    return answer


def ask(
    address: str, method: str, path: str, body: Mapping[str, object] | None = None
) -> tuple[int, dict[str, Any]]:
    """Status and JSON object of an answer, whatever it says. Raises `ClickException` if there is none."""
    host, port = place(address)
    headers = authorization()
    if method != "GET":
        headers["Content-Type"] = "application/json"
    try:
        connection = http.client.HTTPConnection(
            host, port, timeout=READ_WAIT_S if method == "GET" else WAIT_S
        )
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            with connection.getresponse() as response:
                data = response.read(MAX_ANSWER_BYTES)
        finally:
            connection.close()
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise click.ClickException(f"the admin listener at {address} does not answer: {error}") from None
    if response.status == 401:
        raise click.ClickException(f"the admin listener wants its token in {TOKEN_VARIABLE}")
    try:
        answer = json.loads(data)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict):
        raise click.ClickException(
            f"what answers at {address} is no ExpressGateway, or an older one (status {response.status})"
        )
    return response.status, answer


def refusal(status: int, answer: Mapping[str, Any]) -> str:
    """What a refused request is told."""
    details = answer.get("details")
    if isinstance(details, list) and details:
        return "\n".join(["not valid:", *(f"  {detail}" for detail in details)])
    return str(answer.get("error", f"refused with status {status}"))


def admin_address(config: Path, given: str | None) -> str:
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


def check_same_file(config: Path, address: str) -> None:
    """Whether the gateway there runs with this file. Raises `ClickException` if it does not."""
    answer = call(address, "GET", api_path("status"))
    try:
        running = Path(answer["config"]["path"])
    except (KeyError, TypeError):
        raise click.ClickException(f"what answers at {address} is no ExpressGateway") from None
    try:
        same = running.samefile(config)
    except OSError:
        same = running == config.absolute()
    if not same:
        raise click.ClickException(f"the gateway runs with {running}, not with {config}")


def authorization() -> dict[str, str]:
    """The field that carries the token, if there is one. Raises `ClickException`."""
    token = os.environ.get(TOKEN_VARIABLE, "").strip()  # it may come from a file, with the line's end
    if not token:
        return {}
    if not (token.isascii() and token.isprintable()):
        # `http.client` would refuse it, too, and show it in the error.
        raise click.ClickException(f"{TOKEN_VARIABLE} holds characters that no token has")
    return {"Authorization": f"Bearer {token}"}


def table_lines(header: tuple[str, ...], rows: list[tuple[object, ...]]) -> list[str]:
    """Columns as wide as what is in them."""
    cells = [header, *(tuple(map(str, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]


def printable(text: object) -> str:
    """What may quote a peer, for a terminal, which obeys what it does not show."""
    return "".join(char if char.isprintable() else "\ufffd" for char in str(text))


def place(address: str) -> tuple[str, int]:
    """Host and port to connect to. Raises `ClickException`."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    if not host or not (port.isascii() and port.isdigit()) or not 0 < int(port) < 65536:
        raise click.ClickException(f"{address!r} is no address such as 127.0.0.1:9090")
    # A listener on every interface is asked on this machine's own.
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), int(port)
