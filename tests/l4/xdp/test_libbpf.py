"""The door to libbpf: maps, programs, links and files of the kernel, and what is said when it refuses."""

import ctypes
import errno
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from expressgateway.l4.xdp import abi, layout, libbpf
from expressgateway.l4.xdp.libbpf import (
    DRIVER_MODE,
    HARDWARE_MODE,
    INNER_MAP,
    SKB_MODE,
    BpfError,
    Link,
    Map,
    Object,
    Program,
    create_array,
)
from tests.l4.xdp.world import OBJECT, Namespace, World

NO_EXIST, EXIST = 1, 2
FLOW = ctypes.sizeof(layout.Flow)


def u32(number: int) -> bytes:
    return struct.pack("I", number)


@pytest.fixture
def flows(world: World) -> Map:
    return world.maps["flows6"]


class TestAvailable:
    @pytest.fixture
    def forgotten(self) -> Iterator[None]:
        abi.library.cache_clear()
        yield
        abi.library.cache_clear()

    def test_here_it_is(self) -> None:
        assert libbpf.available() is None
        assert libbpf.version().startswith("v1.")
        assert libbpf.possible_cpus() >= len(os.sched_getaffinity(0))

    def test_to_import_it_opens_nothing(self) -> None:
        code = (
            "import expressgateway.l4.xdp.libbpf, expressgateway.l4.xdp.layout, pathlib;"
            "print('libbpf.so' in pathlib.Path('/proc/self/maps').read_text())"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True
        )
        assert done.stdout == "False\n"

    def test_without_the_library(self, forgotten: None, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing(*_: object, **__: object) -> None:
            raise OSError("libbpf.so.1: cannot open shared object file")

        monkeypatch.setattr(ctypes, "CDLL", missing)
        reason = libbpf.available()
        assert reason is not None
        assert "libbpf.so.1 is missing" in reason
        assert "libbpf1" in reason

    def test_with_an_old_one(self, forgotten: None, monkeypatch: pytest.MonkeyPatch) -> None:
        """Which lacks functions: here the C library, which has none of them."""
        real = ctypes.CDLL
        monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: real(None))
        reason = libbpf.available()
        assert reason is not None
        assert "older than 1.0" in reason


@pytest.mark.usefixtures("world")
class TestMaps:
    def test_what_it_is(self, flows: Map) -> None:
        assert (flows.name, flows.key_size, flows.value_size, flows.max_entries) == ("flows6", 40, FLOW, 2048)
        assert repr(flows) == f"Map(flows6, 2048 of 40 -> {FLOW} bytes)"
        assert not os.get_inheritable(flows.fd)

    def test_an_entry(self, flows: Map) -> None:
        key, value = bytes(40), b"\1" * FLOW
        assert flows.get(key) is None
        assert flows.delete(key) is False
        flows.set(key, value)
        assert flows.get(key) == value
        assert list(flows.keys()) == [key]
        with pytest.raises(BpfError) as caught:
            flows.set(key, value, NO_EXIST)
        assert caught.value.errno == errno.EEXIST
        assert str(caught.value) == "cannot set an entry of flows6: File exists"
        assert flows.delete(key) is True
        with pytest.raises(BpfError) as caught:
            flows.set(key, value, EXIST)
        assert caught.value.errno == errno.ENOENT
        assert isinstance(caught.value, OSError)

    @pytest.mark.parametrize(("key", "value"), [(39, FLOW), (41, FLOW), (40, FLOW - 1), (40, 0), (0, FLOW)])
    def test_the_kernel_is_given_no_wrong_sizes(self, flows: Map, key: int, value: int) -> None:
        """It would read on."""
        with pytest.raises(ValueError, match="bytes where"):
            flows.set(bytes(key), bytes(value))
        with pytest.raises(ValueError, match="bytes where"):
            flows.set_batch(bytes(key * 3), bytes(value * 3), 3)
        if key != 40:
            for call in (flows.get, flows.delete):
                with pytest.raises(ValueError, match="bytes where"):
                    call(bytes(key))

    @pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 500])
    @pytest.mark.parametrize("size", [1, 16, 100, 4096])
    def test_many_at_once(self, flows: Map, count: int, size: int) -> None:
        entries = {
            struct.pack("I36x", number): struct.pack(f"I{FLOW - 4}x", number) for number in range(count)
        }
        if count:
            flows.set_batch(b"".join(entries), b"".join(entries.values()), count)
        found = {}
        for keys, values, got in flows.batches(size):
            assert (len(keys), len(values)) == (40 * got, FLOW * got)
            for at in range(got):
                found[keys[40 * at : 40 * at + 40]] = values[FLOW * at : FLOW * at + FLOW]
        assert found == entries
        assert set(flows.keys()) == entries.keys()

    def test_an_array_has_all_its_entries(self) -> None:
        array = create_array("numbers", 4, 100, INNER_MAP)
        assert (array.key_size, array.value_size, array.max_entries) == (4, 4, 100)
        array.set_batch(struct.pack("100I", *range(100)), struct.pack("100I", *range(100, 200)), 100)
        assert array.get(u32(7)) == u32(107)
        assert array.get(u32(100)) is None
        found = list(array.batches(32))
        assert b"".join(values for _, values, _ in found) == struct.pack("100I", *range(100, 200))
        array.close()
        array.close()  # idempotent
        with pytest.raises(BpfError):
            array.get(u32(7))

    def test_each_cpu_has_its_value(self, world: World) -> None:
        counts, cpus = world.maps["backend_counts"], libbpf.possible_cpus()
        values = [struct.pack("5Q", cpu, 0, 0, 0, 9) for cpu in range(cpus)]
        counts.set(u32(3), b"".join(values))
        assert counts.get_percpu(u32(3)) == values
        assert counts.get_percpu(u32(layout.MAX_BACKENDS)) == []
        for keys, batch, got in counts.batches(64):
            if u32(3) == keys[12:16]:
                assert batch[3 * 40 * cpus : 4 * 40 * cpus] == b"".join(values)
            assert len(batch) == got * 40 * cpus

    def test_a_map_in_a_map(self, world: World) -> None:
        array = create_array("inner", 4, 3, INNER_MAP)
        world.maps["tables"].set(u32(9), u32(array.fd))
        assert world.maps["tables"].get(u32(9)) == u32(array.id)
        assert world.maps["tables"].delete(u32(9))
        plain = create_array("other", 4, 3)
        with pytest.raises(BpfError) as caught:
            world.maps["tables"].set(u32(9), u32(plain.fd))
        assert caught.value.errno == errno.EINVAL
        array.close()
        plain.close()

    def test_a_map_that_the_kernel_does_not_make(self) -> None:
        with pytest.raises(BpfError) as caught:
            create_array("none", 0, 0)
        assert caught.value.errno == errno.EINVAL
        assert str(caught.value) == "cannot make the map none: Invalid argument"


class TestObjects:
    def test_there_is_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(BpfError) as caught:
            Object.open(tmp_path / "none.o")
        assert caught.value.errno == errno.ENOENT
        assert str(tmp_path / "none.o") in str(caught.value)

    @pytest.mark.parametrize("size", [0, 4, 100, 5000, 50000])
    def test_a_file_that_is_cut_off(self, tmp_path: Path, size: int) -> None:
        path = tmp_path / "cut.o"
        path.write_bytes(OBJECT.read_bytes()[:size])
        with pytest.raises(BpfError) as caught:
            Object.open(path)
        assert "libbpf" in str(caught.value)

    def test_what_the_verifier_says_is_passed_on(self, world: World, tmp_path: Path) -> None:
        """Its last lines: the first ones are long."""
        with Object.open(OBJECT) as good:
            begins = good.instructions()["sweep"][:32]
        content = OBJECT.read_bytes()
        assert content.count(begins) == 1
        path = tmp_path / "bad.o"
        path.write_bytes(
            content.replace(begins, b"\xbf\x50" + bytes(6) + begins[8:])
        )  # r0 = r5, which is nothing
        with Object.open(path) as bad:
            with pytest.raises(BpfError) as caught:
                bad.load()
            assert (bad.maps, bad.programs) == ({}, {})
        assert caught.value.errno in (errno.EACCES, errno.EINVAL)
        assert any("R5 !read_ok" in line for line in caught.value.said), caught.value.said
        assert len(caught.value.said) <= 24

    def test_maps_of_another_size(self, world: World) -> None:
        with Object.open(OBJECT) as thing:
            thing.resize("flows4", 100)
            thing.resize("flows6", 200)
            with pytest.raises(BpfError) as caught:
                thing.resize("nothing", 1)
            assert caught.value.errno == errno.ENOENT
            assert thing.map_shapes()["flows4"].max_entries == 100
            thing.load()
        # They outlive the object.
        assert (thing.maps["flows4"].max_entries, thing.maps["flows6"].max_entries) == (100, 200)
        thing.maps["flows4"].set(bytes(16), bytes(FLOW))
        close(thing)

    def test_maps_that_are_there_already(self, world: World) -> None:
        """A new program with the old one's flows."""
        world.maps["flows4"].set(b"\7" * 16, b"\1" * FLOW)
        with Object.open(OBJECT) as thing:
            for name, existing in world.maps.items():
                thing.reuse(name, existing)
            thing.load()
        assert thing.maps["flows4"].get(b"\7" * 16) == b"\1" * FLOW
        assert thing.maps["flows4"].id == world.maps["flows4"].id
        assert thing.programs["balance"].id != world.programs["balance"].id
        close(thing)

    def test_a_map_that_does_not_fit(self, world: World) -> None:
        with Object.open(OBJECT) as thing:
            thing.reuse("flows6", world.maps["flows4"])
            with pytest.raises(BpfError):
                thing.load()

    def test_nothing_is_left_open(self, world: World) -> None:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            with Object.open(OBJECT) as thing:
                thing.resize("flows4", 16)
                thing.resize("flows6", 16)
                thing.load()
            close(thing)
        assert len(os.listdir("/proc/self/fd")) == before


def close(thing: Object) -> None:
    for each in thing.maps.values():
        each.close()
    for program in thing.programs.values():
        program.close()


@pytest.mark.usefixtures("world")
class TestPrograms:
    def test_what_it_is(self, world: World) -> None:
        program = world.programs["balance"]
        info = libbpf.program_info(program.id)
        assert (info.id, info.name, len(info.tag)) == (program.id, "balance", 16)
        assert repr(program) == f"Program(balance, {program.id})"
        assert not os.get_inheritable(program.fd)

    def test_one_that_is_not_there(self) -> None:
        with pytest.raises(BpfError) as caught:
            libbpf.program_info(0x7FFFFFFF)
        assert caught.value.errno == errno.ENOENT

    def test_a_frame(self, world: World) -> None:
        run = world.programs["balance"].test_run(bytes(60), ifindex=world.front, repeat=100)
        assert (run.verdict, run.data) == (2, bytes(60))
        assert run.duration_ns >= 0

    def test_an_interface_that_is_not_there(self, world: World) -> None:
        with pytest.raises(BpfError) as caught:
            world.programs["balance"].test_run(bytes(60), ifindex=9999)
        assert "try the program balance" in str(caught.value)

    def test_a_program_that_is_run(self, world: World) -> None:
        result, context = world.programs["sweep"].run(bytes(layout.Sweep(removed=7)))
        assert result == 0
        assert layout.Sweep.from_buffer_copy(context).removed == 0


class TestLinks:
    @pytest.fixture
    def place(self, world: World) -> Iterator[int]:
        """A device of the namespace that nobody asks for its routes, anew for each test."""
        world.namespace.ip("link add spare type veth peer name spare-end", "link set spare up")
        yield world.namespace.index("spare")
        if world.namespace.index("spare"):
            world.namespace.ip("link del spare")

    @pytest.mark.parametrize(("mode", "name"), [(SKB_MODE, "skb"), (DRIVER_MODE, "native"), (0, "native")])
    def test_on_an_interface(self, world: World, place: int, mode: int, name: str) -> None:
        program = world.programs["balance"]
        assert libbpf.attached(place) == {}
        link = Link.create(program, place, mode)
        assert libbpf.attached(place) == {name: program.id}
        assert link.info() == (place, program.id)
        assert not os.get_inheritable(link.fd)
        link.detach()
        assert libbpf.attached(place) == {}
        link.close()
        link.close()

    def test_it_ends_with_its_last_descriptor(self, world: World, place: int) -> None:
        link = Link.create(world.programs["balance"], place, SKB_MODE)
        link.close()
        assert libbpf.attached(place) == {}

    def test_another_program_in_its_place(self, world: World, place: int) -> None:
        with Object.open(OBJECT) as thing:
            for name, existing in world.maps.items():
                thing.reuse(name, existing)
            thing.load()
        link = Link.create(world.programs["balance"], place, 0)
        link.update(thing.programs["balance"])
        assert libbpf.attached(place) == {"native": thing.programs["balance"].id}
        link.close()
        close(thing)

    def test_a_place_that_is_taken(self, world: World, place: int) -> None:
        link = Link.create(world.programs["balance"], place, 0)
        with pytest.raises(BpfError) as caught:
            Link.create(world.programs["balance"], place, 0)
        assert caught.value.errno == errno.EBUSY
        assert f"attach balance to interface {place}" in str(caught.value)
        link.close()

    def test_a_mode_that_there_is_not(self, world: World, place: int) -> None:
        with pytest.raises(BpfError) as caught:
            Link.create(world.programs["balance"], place, HARDWARE_MODE)
        assert caught.value.errno in (errno.EOPNOTSUPP, errno.EINVAL)

    def test_an_interface_that_there_is_not(self, world: World) -> None:
        with pytest.raises(BpfError) as caught:
            Link.create(world.programs["balance"], 9999, 0)
        assert caught.value.errno in (errno.ENODEV, errno.EINVAL)

    def test_an_interface_that_goes(self, world: World, place: int) -> None:
        link = Link.create(world.programs["balance"], place, 0)
        world.namespace.ip("link del spare")
        assert link.info() == (0, world.programs["balance"].id)
        link.close()

    def test_a_program_of_another_kind(self, world: World, place: int) -> None:
        with pytest.raises(BpfError):
            Link.create(world.programs["sweep"], place, 0)


@pytest.mark.usefixtures("world")
class TestPins:
    @pytest.fixture
    def files(self, tmp_path: Path) -> Iterator[Path]:
        """A BPF file system of our own."""
        mounted = subprocess.run(
            ["mount", "-t", "bpf", "bpf", str(tmp_path)], capture_output=True, text=True, check=False
        )
        if mounted.returncode:
            pytest.skip(f"no BPF file system can be mounted here: {mounted.stderr.strip()}")
        yield tmp_path
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)

    def test_a_map(self, files: Path) -> None:
        array = create_array("kept", 4, 3)
        array.set(u32(1), u32(5))
        array.pin(files / "kept-under-a-longer-name")
        array.close()
        again = Map.pinned(files / "kept-under-a-longer-name")
        assert again.get(u32(1)) == u32(5)
        assert again.name == "kept-under-a-longer-name"
        with pytest.raises(BpfError) as caught:
            again.pin(files / "kept-under-a-longer-name")
        assert caught.value.errno == errno.EEXIST
        again.close()

    def test_a_link_outlives_its_descriptor(self, world: World, files: Path) -> None:
        world.namespace.ip("link add kept type veth peer name kept-end")
        place = world.namespace.index("kept")
        link = Link.create(world.programs["balance"], place, 0)
        link.pin(files / "link-kept")
        link.close()
        assert libbpf.attached(place) != {}
        again = Link.pinned(files / "link-kept")
        assert again.info() == (place, world.programs["balance"].id)
        (files / "link-kept").unlink()
        again.close()
        assert libbpf.attached(place) == {}
        world.namespace.ip("link del kept")

    @pytest.mark.parametrize("kind", [Map, Link])
    def test_nothing_is_there(self, files: Path, kind: type[Map | Link]) -> None:
        with pytest.raises(BpfError) as caught:
            kind.pinned(files / "nothing")
        assert caught.value.errno == errno.ENOENT
        assert str(caught.value) == f"cannot open {files / 'nothing'}: No such file or directory"

    def test_not_a_bpf_file_system(self, tmp_path: Path) -> None:
        array = create_array("kept", 4, 3)
        with pytest.raises(BpfError) as caught:
            array.pin(tmp_path / "kept")
        assert caught.value.errno == errno.EPERM
        array.close()


def test_the_namespace_is_left_as_it_was(world: World) -> None:
    """These tests are in a network namespace; whoever comes after them is not."""
    inside = os.readlink("/proc/thread-self/ns/net")
    with Namespace():
        assert os.readlink("/proc/thread-self/ns/net") != inside
    assert os.readlink("/proc/thread-self/ns/net") == inside
    assert os.readlink("/proc/self/ns/net") == inside
    assert isinstance(world.programs["balance"], Program)
