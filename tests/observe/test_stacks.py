"""The sheet on which a process tells where it is in its code."""

import os
import signal
import subprocess
import sys

import pytest

from expressgateway.observe.stacks import MAX_BYTES, Sheet

DEEP = """
import os, sys
from expressgateway.observe.stacks import tell_on
tell_on(int(sys.argv[1]))

def {name}(depth):
    if depth:
        {name}(depth - 1)
    else:
        os.kill(os.getpid(), 3)

for depth in map(int, sys.argv[2:]):
    {name}(depth)
"""


def told(*depths: int, name: str = "inner", clear_at: bool = False) -> str:
    sheet = Sheet()
    try:
        for depth in depths:
            sheet.clear()
            subprocess.run(
                [sys.executable, "-c", DEEP.format(name=name), str(sheet.fd), str(depth)],
                pass_fds=[sheet.fd],
                check=True,
            )
        return sheet.read()
    finally:
        sheet.close()


def test_every_frame() -> None:
    text = told(3)
    assert text.startswith("Current thread")
    assert text.count(" in inner") == 4


def test_only_the_newest_after_it_was_cleared() -> None:
    assert told(5, 0).count(" in inner") == 1


def test_nothing_yet_and_nothing_any_more() -> None:
    sheet = Sheet()
    assert sheet.read() == ""
    sheet.close()
    sheet.close()
    assert sheet.read() == ""


def test_it_never_grows() -> None:
    sheet = Sheet()
    many = ["50"] * 100
    command = [sys.executable, "-c", DEEP.format(name="inner"), str(sheet.fd), *many]
    subprocess.run(command, pass_fds=[sheet.fd], check=True)
    assert os.fstat(sheet.fd).st_size == MAX_BYTES
    assert sheet.read().endswith("... cut here")
    with pytest.raises(PermissionError):
        os.pwrite(sheet.fd, b"x", MAX_BYTES)
    sheet.close()


def test_the_signal_is_one_that_ends_who_does_not_listen() -> None:
    """Who passes a sheet must know that the other end has been told of it: see `Worker.stacks`."""
    process = subprocess.run([sys.executable, "-c", "import os; os.kill(os.getpid(), 3)"], check=False)
    assert process.returncode == -signal.SIGQUIT
