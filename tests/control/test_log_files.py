"""The file of the access log is there for the workers, or the start fails with a sentence."""

import os
import pwd
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from expressgateway.control.failures import StartError
from expressgateway.control.log_files import prepare
from expressgateway.control.privileges import Identity
from expressgateway.observe.access_log import open_log

ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
SAME = Identity()


def nobody() -> Identity:
    entry = pwd.getpwnam("nobody")
    return Identity(entry.pw_uid, entry.pw_gid)


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that everybody can enter; those of pytest belong to one user."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture(autouse=True)
def rights() -> Iterator[None]:
    """Whatever happens, the process is who it was."""
    before = (os.getresuid(), os.getresgid(), os.getgroups())
    yield
    assert (os.getresuid(), os.getresgid(), os.getgroups()) == before


class TestAsOneself:
    @pytest.mark.parametrize("umask", [0o000, 0o077])
    def test_an_absent_file_is_made(self, tmp_path: Path, umask: int) -> None:
        path = tmp_path / "access.log"
        before = os.umask(umask)
        try:
            prepare(str(path), SAME)
        finally:
            os.umask(before)
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        assert (path.stat().st_uid, path.stat().st_gid) == (os.geteuid(), os.getegid())
        os.close(open_log(str(path)))

    def test_what_exists_is_left_as_it_is(self, tmp_path: Path) -> None:
        path = tmp_path / "access.log"
        path.write_text("before\n")
        path.chmod(0o604)
        prepare(str(path), SAME)
        prepare(str(path), SAME)
        assert path.read_text() == "before\n"
        assert stat.S_IMODE(path.stat().st_mode) == 0o604

    def test_what_cannot_be(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "fifo")
        (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
        for name, sentence in (
            ("absent/access.log", "cannot be created: No such file or directory; create its directory"),
            (".", "it is not a file; name one"),
            ("fifo", "nobody reads it"),
            ("dangling", "No such file or directory"),
        ):
            with pytest.raises(StartError, match=sentence) as caught:
                prepare(str(tmp_path / name), SAME)
            assert "observability.access_log.path" in str(caught.value)
        assert not (tmp_path / "nowhere").exists()

    def test_a_fifo_with_a_reader(self, tmp_path: Path) -> None:
        path = tmp_path / "fifo"
        os.mkfifo(path)
        reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        prepare(str(path), SAME)
        os.close(reader)

    def test_standard_output(self) -> None:
        prepare("stdout", SAME)
        check = (
            "import os; os.close(1)\n"
            "from expressgateway.control.log_files import prepare\n"
            "from expressgateway.control.privileges import Identity\n"
            "prepare('stdout', Identity())"
        )
        done = subprocess.run(
            [sys.executable, "-c", check], capture_output=True, text=True, timeout=60, check=False
        )
        assert "StartError: observability.access_log.path is stdout, and standard output" in done.stderr


@ROOT_ONLY
class TestForTheWorkers:
    def test_an_absent_file_is_made_theirs(self, public: Path) -> None:
        path, who = public / "access.log", nobody()
        prepare(str(path), who)
        assert (path.stat().st_uid, path.stat().st_gid) == (who.user, who.group)
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        subprocess.run(
            ["/bin/sh", "-c", 'echo line >> "$1"', "sh", str(path)],
            user=who.user,
            group=who.group,
            extra_groups=[],
            check=True,
            timeout=10,
        )
        assert path.read_text() == "line\n"

    def test_only_a_group(self, public: Path) -> None:
        path, who = public / "access.log", nobody()
        prepare(str(path), Identity(None, who.group))
        assert (path.stat().st_uid, path.stat().st_gid) == (0, who.group)

    def test_a_file_they_may_not_write_is_left_and_named(self, public: Path) -> None:
        path = public / "access.log"
        path.write_text("root's\n")
        path.chmod(0o644)
        with pytest.raises(StartError, match=rf"by user {nobody().user}: Permission denied; let user"):
            prepare(str(path), nobody())
        assert (path.stat().st_uid, path.read_text()) == (0, "root's\n")

    def test_a_group_of_the_supervisors_does_not_count(self, public: Path) -> None:
        """Workers have none but their own."""
        path, groups = public / "access.log", os.getgroups()
        path.touch()
        os.chown(path, 0, 4)
        path.chmod(0o660)
        os.setgroups([*groups, 4])
        try:
            with pytest.raises(StartError, match="Permission denied"):
                prepare(str(path), nobody())
            assert 4 in os.getgroups()
        finally:
            os.setgroups(groups)

    def test_a_directory_they_may_not_enter(self, public: Path) -> None:
        closed = public / "closed"
        closed.mkdir(0o700)
        path = closed / "access.log"
        with pytest.raises(StartError, match="enter its directory"):
            prepare(str(path), nobody())
        assert not path.exists()

    def test_a_link_of_theirs_gives_nothing_away(self, public: Path) -> None:
        who = nobody()
        secret = public / "secret"
        secret.write_text("root's\n")
        secret.chmod(0o600)
        theirs = public / "theirs"
        theirs.mkdir()
        (theirs / "access.log").symlink_to(secret)
        (theirs / "new.log").symlink_to(public / "made-by-root")
        os.chown(theirs, who.user or -1, who.group or -1)
        for name in ("access.log", "new.log"):
            with pytest.raises(StartError):
                prepare(str(theirs / name), who)
        assert (secret.stat().st_uid, stat.S_IMODE(secret.stat().st_mode)) == (0, 0o600)
        assert not (public / "made-by-root").exists()
