"""The object that ships is the one that the source makes.

It is committed, so that nobody needs a compiler who installs the package; so somebody has to look. With the
compiler that `compiler.txt` names it is the same, byte for byte. Another one makes other instructions of the
same source: then programs, maps and types are compared, and the kernel has to take what it made.
"""

import errno
import os
import subprocess
from pathlib import Path

import pytest

from expressgateway.l4.xdp import layout
from expressgateway.l4.xdp.libbpf import BpfError, Object
from tests.e2e.harness import need, program
from tests.l4.xdp.world import OBJECT
from tests.test_repository import ROOT

SCRIPT = ROOT / "tools" / "build_bpf.sh"
needs_compiler = need("clang", "llvm-strip")


def build(output: Path) -> None:
    done = subprocess.run(
        ["sh", str(SCRIPT), str(output)], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr


def version() -> str:
    done = subprocess.run(
        [program("clang"), "--version"], capture_output=True, text=True, timeout=20, check=True
    )
    return done.stdout.partition("\n")[0]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("object") / "made.o"
    build(output)
    return output


@needs_compiler
def test_the_object_is_made_of_the_source(made: Path) -> None:
    recorded = (OBJECT.parent / "compiler.txt").read_text().strip()
    if version() == recorded:
        assert made.read_bytes() == OBJECT.read_bytes(), "the source has changed since: make bpf"
    with Object.open(made) as ours, Object.open(OBJECT) as committed:
        assert ours.instructions().keys() == committed.instructions().keys() == {"balance", "sweep"}
        assert ours.types() == committed.types()
        assert ours.map_shapes() == committed.map_shapes()


@needs_compiler
def test_what_this_compiler_makes_can_be_loaded(made: Path) -> None:
    with Object.open(made) as ours:
        try:
            ours.load()
        except BpfError as error:
            if error.errno not in (errno.EPERM, errno.ENOSYS):
                raise
            pytest.skip(f"the kernel forbids BPF here: {error.strerror}")
        for each in ours.maps.values():
            each.close()
        for made_program in ours.programs.values():
            made_program.close()


@needs_compiler
def test_it_does_not_tell_where_it_was_made(made: Path, tmp_path: Path) -> None:
    """Nor does it depend on it."""
    for file in OBJECT.parent.glob("*.[ch]"):
        copy = tmp_path / "src" / "expressgateway" / "l4" / "xdp" / "bpf" / file.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    script = tmp_path / "tools" / SCRIPT.name
    script.parent.mkdir()
    script.write_bytes(SCRIPT.read_bytes())
    output = tmp_path / "elsewhere.o"
    subprocess.run(["sh", str(script), str(output)], check=True, timeout=100, cwd="/")
    assert output.read_bytes() == made.read_bytes()
    for place in (os.fsencode(ROOT), os.fsencode(tmp_path)):
        assert place not in OBJECT.read_bytes()
        assert place not in output.read_bytes()


def test_it_has_the_types_of_the_layout_and_no_debugger_s_notes() -> None:
    with Object.open(OBJECT) as committed:
        layout.check(committed)
    content = OBJECT.read_bytes()
    assert b".BTF.ext" in content
    assert b".debug_info" not in content
