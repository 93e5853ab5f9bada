"""Who the workers become. What needs root is skipped without it."""

import os
import pwd
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from expressgateway.config.schema import Runtime
from expressgateway.control.failures import StartError
from expressgateway.control.privileges import Identity, raise_file_limit, worker_identity
from tests.control.gateway import Gateway

ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")


def runtime(**settings: str) -> Runtime:
    return Runtime.model_validate(settings)


def test_unset() -> None:
    assert worker_identity(runtime()) == Identity()


@ROOT_ONLY
def test_user_brings_its_group() -> None:
    nobody = pwd.getpwnam("nobody")
    assert worker_identity(runtime(user="nobody")) == Identity(nobody.pw_uid, nobody.pw_gid)
    assert worker_identity(runtime(user="nobody", group="root")) == Identity(nobody.pw_uid, 0)
    assert worker_identity(runtime(group="root")) == Identity(None, 0)


def test_without_root(monkeypatch: pytest.MonkeyPatch) -> None:
    nobody = pwd.getpwnam("nobody")
    monkeypatch.setattr(os, "geteuid", lambda: nobody.pw_uid)
    monkeypatch.setattr(os, "getegid", lambda: nobody.pw_gid)
    assert worker_identity(runtime(user="nobody")) == Identity()  # nothing to do
    with pytest.raises(StartError, match=r"runtime\.user needs root"):
        worker_identity(runtime(user="root"))


def test_account_that_went_away() -> None:
    with pytest.raises(StartError, match="unknown on this machine"):
        worker_identity(runtime(user="no-such-user-here"))


def test_file_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 500), hard))
        assert raise_file_limit() == hard
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


SOURCE = Path(__file__).parents[2] / "src"


def _python_for_nobody() -> str | None:
    """An interpreter that the user nobody may run, with the package; those in /root are not."""
    check = "import expressgateway.control.census, expressgateway.control.channel"
    for python in (sys.executable, "/usr/bin/python3"):
        try:
            done = subprocess.run(
                [python, "-c", check],
                user="nobody",
                env={"PYTHONPATH": str(SOURCE)},
                capture_output=True,
                check=False,
            )
        except OSError:
            continue
        if done.returncode == 0:
            return python
    return None


@ROOT_ONLY
def test_workers_run_as_the_user_and_the_supervisor_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = _python_for_nobody()
    if python is None:
        pytest.skip("the user nobody can reach no Python with this package")
    monkeypatch.setenv("FAKE_WORKER_PYTHON", python)
    monkeypatch.setenv("PYTHONPATH", str(SOURCE))
    gateway = Gateway(tmp_path, runtime='user = "nobody"')
    gateway.extra_groups = [0, 4]
    with gateway, gateway.connect() as client:
        nobody = pwd.getpwnam("nobody")
        assert client.uid == nobody.pw_uid
        status = Path(f"/proc/{client.pid}/status").read_text()
        fields = dict(line.split(":", 1) for line in status.splitlines())
        assert fields["Uid"].split() == [str(nobody.pw_uid)] * 4
        assert fields["Gid"].split() == [str(nobody.pw_gid)] * 4
        assert fields["Groups"].split() == []
        assert Path(f"/proc/{gateway.process.pid}").stat().st_uid == 0
