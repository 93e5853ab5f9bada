"""The world of these tests, made once for each of their modules."""

import errno
import os
import shutil
from collections.abc import Iterator

import pytest

from expressgateway.l4.xdp import libbpf
from tests.l4.xdp.world import V4, V6, Family, Namespace, World

FORBIDDEN = (errno.EPERM, errno.EACCES, errno.ENOSYS)


@pytest.fixture(scope="session", autouse=True)
def library() -> None:
    """Where libbpf is missing tests are skipped by name; in CI they fail instead."""
    reason = libbpf.available()
    if reason is not None:
        assert os.environ.get("CI") != "true", reason
        pytest.skip(reason)


@pytest.fixture(scope="module")
def made_world(library: None) -> Iterator[World]:
    """What the kernel forbids is skipped, everywhere: there is nothing that could be installed."""
    if shutil.which("ip", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin") is None:
        assert os.environ.get("CI") != "true", "iproute2 is missing"
        pytest.skip("needs ip")
    try:
        namespace = Namespace().__enter__()
    except OSError as error:
        if error.errno not in FORBIDDEN:
            raise
        pytest.skip(f"no network namespace can be made here: {error.strerror}")
    try:
        try:
            world = World(namespace)
        except libbpf.BpfError as error:
            if error.errno not in FORBIDDEN or (os.geteuid() == 0 and error.errno == errno.EACCES):
                raise  # EACCES is the verifier's as well
            pytest.skip(f"the kernel forbids BPF here: {error.strerror}")
        yield world
        world.close()
    finally:
        namespace.__exit__()


@pytest.fixture
def world(made_world: World) -> World:
    made_world.reset()
    return made_world


@pytest.fixture(params=[V4, V6], ids=["v4", "v6"])
def family(request: pytest.FixtureRequest) -> Family:
    found: Family = request.param
    return found
