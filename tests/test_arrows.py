"""The rooms' arrows: who may import whom, read from the source. The table is the architecture."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "expressgateway"

# Each room may import itself and what is listed: a room, or one module of it.
ARROWS: dict[str, tuple[str, ...]] = {
    "wire": (),
    "observe": (),
    "config": ("regex", "memory_file"),
    "extend": (),
    "upstream": ("wire", "observe"),
    "regex": (),
    "memory_file": (),
    "proxy": ("wire", "upstream", "observe", "regex"),
    "net": ("wire", "upstream", "observe", "proxy", "memory_file"),
    "l4": ("wire", "upstream", "observe", "proxy", "net"),
    "control": (
        "config",
        "observe",
        "upstream",
        "wire",
        "net.tickets",
        "net.tls",
        "net.quic.handover",
        "net.quic.spares",
        "net.quic.steering",
        "net.quic.verify",
        "l4.xdp",
    ),
    "worker": (
        "wire",
        "upstream",
        "observe",
        "proxy",
        "net",
        "l4",
        "extend",
        "config",
        "control.channel",
        "control.census",
        "control.notify",
        "control.parcels",
        "control.targets",
    ),
    "exporter": ("observe",),
    "demo": ("wire", "config"),
    "cli": ("config", "control", "demo", "observe"),
    "__init__": (),
    "__main__": ("cli",),
}

# Modules of others that a room does without, and the files that are that room's one door to them.
OUTSIDE: dict[str, tuple[str, ...]] = {
    "wire": ("asyncio", "ssl", "socket", "time", "logging", "select", "threading"),
    "proxy": ("asyncio", "ssl", "socket", "select", "threading"),
    "upstream": ("asyncio", "ssl", "socket", "select", "threading"),
    "config": ("asyncio", "socket", "select", "threading"),
    "observe": ("asyncio", "socket", "select"),
}
DOORS: dict[str, tuple[str, ...]] = {
    "upstream/dns.py": ("asyncio",),
    "observe/log_stream.py": ("select", "socket"),
}

MAX_LINES = 600
LONG_WITH_REASON: dict[str, str] = {}


@cache
def sources() -> dict[str, ast.Module]:
    return {
        path.relative_to(SOURCE).as_posix(): ast.parse(path.read_text())
        for path in sorted(SOURCE.rglob("*.py"))
    }


def room_of(name: str) -> str:
    return name.partition("/")[0].removesuffix(".py")


def imports(name: str, tree: ast.Module) -> Iterator[str]:
    """Every module that this one imports, wherever in it, by its full name."""
    package = ["expressgateway", *name.split("/")[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # ``from a.b import c``: c may be a module of its own.
            yield from (f"{module}.{alias.name}" for alias in node.names)


def wrong_arrows(name: str, tree: ast.Module) -> list[str]:
    room = room_of(name)
    allowed = tuple(f"expressgateway.{each}" for each in (room, *ARROWS[room]))
    outside = set(OUTSIDE.get(room, ())) - set(DOORS.get(name, ()))
    wrong = []
    for imported in imports(name, tree):
        if imported.startswith("expressgateway."):
            is_within = any(imported == each or imported.startswith(each + ".") for each in allowed)
            if not is_within and imported != "expressgateway.__version__":
                wrong.append(imported)
        elif imported.partition(".")[0] in outside:
            wrong.append(imported)
    return wrong


@pytest.mark.parametrize("name", sources())
def test_imports_point_the_right_way(name: str) -> None:
    assert wrong_arrows(name, sources()[name]) == []


def test_what_the_supervisor_has_of_l4_knows_no_transport() -> None:
    """`l4/xdp` is control's: it must not bring a worker's rooms with it."""
    rooms = ("net", "proxy", "wire", "l4.tcp", "l4.udp", "l4.passthrough")
    found = [
        (name, imported)
        for name, tree in sources().items()
        if name.startswith("l4/xdp/")
        for imported in imports(name, tree)
        if imported.removeprefix("expressgateway.").startswith(rooms)
        and imported.startswith("expressgateway.")
    ]
    assert found == []


def test_every_room_is_in_the_table_and_every_word_of_the_table_is_there() -> None:
    assert {room_of(name) for name in sources()} == set(ARROWS)
    for arrow in {each for allowed in ARROWS.values() for each in allowed}:
        path = arrow.replace(".", "/")
        assert any(name == f"{path}.py" or name.startswith(f"{path}/") for name in sources()), arrow
    assert DOORS.keys() <= sources().keys()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("wire/x.py", "import asyncio"),
        ("wire/h1/x.py", "from time import monotonic"),
        ("wire/x.py", "def late():\n    from ..net import stream"),
        ("wire/x.py", "from expressgateway.observe.counters import Tally"),
        ("proxy/x.py", "from expressgateway import net"),
        ("upstream/pool.py", "import asyncio"),
        ("upstream/x.py", "import expressgateway.proxy.exchange"),
        ("net/x.py", "from expressgateway.l4 import tcp"),
        ("control/x.py", "from expressgateway.net.stream import Stream"),
        ("control/x.py", "from expressgateway.net import listener"),
        ("worker/x.py", "from expressgateway.control.supervisor import Supervisor"),
        ("config/x.py", "from expressgateway.wire.head import Fields"),
    ],
)
def test_a_wrong_arrow_is_seen(name: str, text: str) -> None:
    assert wrong_arrows(name, ast.parse(text))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("wire/h1/x.py", "from ..head import RequestHead\nfrom . import fields"),
        ("upstream/dns.py", "import asyncio"),
        ("control/x.py", "from expressgateway.net.tickets import pack_keys"),
        ("cli/x.py", "from expressgateway import __version__"),
    ],
)
def test_a_right_arrow_is_no_fault(name: str, text: str) -> None:
    assert wrong_arrows(name, ast.parse(text)) == []


def test_no_file_is_too_long() -> None:
    lengths = {name: (SOURCE / name).read_bytes().count(b"\n") for name in sources()}
    long = {name for name, length in lengths.items() if length > MAX_LINES}
    assert long == LONG_WITH_REASON.keys()


def test_every_module_says_what_it_is_for() -> None:
    assert [name for name, tree in sources().items() if not ast.get_docstring(tree)] == []


def test_no_task_without_an_owner_and_no_bare_except() -> None:
    found = []
    for name, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler) and node.type is None:
                found.append(f"{name}:{node.lineno}: bare except")
            if (
                isinstance(node, ast.Attribute)
                and node.attr == "create_task"
                and isinstance(node.value, ast.Name)
                and node.value.id == "asyncio"
            ):
                found.append(f"{name}:{node.lineno}: asyncio.create_task")
    assert found == []
