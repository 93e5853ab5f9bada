"""Run-time changes: what they make of a configuration, and what they refuse."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expressgateway.config.load import Loaded
from expressgateway.config.material import Material
from expressgateway.config.schema import Backend, Config, Pool
from expressgateway.control.changes import (
    AddBackend,
    Change,
    ChangeError,
    RemoveBackend,
    SetWeight,
    changed,
)
from expressgateway.control.plan import Changed, backends_of, plan, runtime_changes
from tests.config.material import write_certs

BASE: dict[str, Any] = {
    "listeners": [
        {
            "name": "web",
            "address": "127.0.0.1:8080",
            "protocol": "h1",
            "backends": [{"address": "127.0.0.1:9000", "id": "b1"}, {"address": "127.0.0.1:9001"}],
        },
        {"name": "relay", "address": "127.0.0.1:8081", "protocol": "tcp", "pool": "api"},
        {"name": "dns", "address": "127.0.0.1:8053", "protocol": "udp", "pool": "names"},
    ],
    "pools": [
        {"name": "api", "backends": [{"address": "backend.test:9000", "id": "n1"}]},
        {"name": "names", "backends": [{"address": "127.0.0.1:53", "id": "d1"}]},
    ],
    "observability": {"metrics_bind": "127.0.0.1:9090"},
}


def loaded(directory: Path = Path(), **blocks: object) -> Loaded:
    document = copy.deepcopy(BASE) | blocks
    return Loaded(Config.model_validate(document), directory / "x.toml", (), Material({"/certs/a": b"a"}))


def add(pool: str, **table: object) -> AddBackend:
    return AddBackend(pool, table)


def after(*changes: Change, base: Loaded | None = None) -> Loaded:
    current = base or loaded()
    for change in changes:
        current = changed(current, change)
    return current


def refused(change: Change, base: Loaded | None = None) -> ChangeError:
    with pytest.raises(ChangeError) as caught:
        changed(base or loaded(), change)
    return caught.value


def ids(current: Loaded, pool: str) -> list[str]:
    return [backend.id for backend in backends_of(current.config)[pool]]


def weights(current: Loaded, pool: str) -> list[int]:
    return [backend.weight for backend in backends_of(current.config)[pool]]


def as_a_worker_reads_it(current: Loaded) -> Config:
    return Config.model_validate(current.config.model_dump(mode="json"), context={"rules_later": True})


def pool_read(current: Loaded, name: str) -> Pool:
    """The pool of a listener, as a worker reads it."""
    config = as_a_worker_reads_it(current)
    pools = map(config.pool_of, config.listeners)
    return next(pool for pool in pools if pool is not None and pool.name == name)


class TestAdd:
    def test_defaults_are_those_of_the_file(self) -> None:
        current = after(add("web", address="LocalHost:9002"))
        new = backends_of(current.config)["web"][-1]
        assert (new.id, new.weight, new.protocol) == (
            "localhost:9002",
            1,
            "h1",
        )  # on HTTP listeners tcp is h1

    def test_named_pool_and_its_listener(self) -> None:
        current = after(add("api", address="127.0.0.1:9002", id="n2", tls=True, weight=3))
        new = backends_of(current.config)["api"][-1]
        assert (new.protocol, new.tls_verify_hostname, new.weight) == ("tcp", "127.0.0.1", 3)
        assert ids(current, "api") == ["n1", "n2"]

    def test_the_same_as_from_a_file(self) -> None:
        table = {"address": "127.0.0.1:9002", "weight": 7, "tls": True, "send_proxy": "v2"}
        document = copy.deepcopy(BASE)
        document["listeners"][0]["backends"].append(table)
        written = Loaded(Config.model_validate(document), Path("x.toml"))
        assert after(AddBackend("web", table)).config.model_dump() == written.config.model_dump()

    def test_old_one_is_left_alone(self) -> None:
        base = loaded()
        before = base.config.model_dump()
        after(add("web", address="a:1"), SetWeight("web", "b1", 0), RemoveBackend("api", "n1"), base=base)
        assert base.config.model_dump() == before

    @pytest.mark.parametrize(
        ("pool", "sentence"),
        [
            ("wbe", 'there is no pool "wbe": did you mean "web"?'),
            ("nothing-like-it", 'there is no pool "nothing-like-it": the pools are web, api, names'),
            ("relay", 'there is no pool "relay": the pools are web, api, names'),
            ("", "the pools are"),
        ],
    )
    def test_unknown_pool(self, pool: str, sentence: str) -> None:
        error = refused(add(pool, address="a:1"))
        assert error.status == 404
        assert sentence in str(error)

    @pytest.mark.parametrize(
        ("table", "advice"),
        [
            ({"address": "a:1", "id": "b1"}, "give it another id"),
            ({"address": "127.0.0.1:9001"}, "give it an id of its own"),
        ],
    )
    def test_taken_id(self, table: Mapping[str, object], advice: str) -> None:
        error = refused(AddBackend("web", table))
        assert error.status == 409
        assert str(error).startswith("pool web has a backend ")
        assert advice in str(error)

    def test_same_address_under_another_id(self) -> None:
        assert ids(after(add("web", address="127.0.0.1:9000", id="b2")), "web")[-1] == "b2"

    @pytest.mark.parametrize(
        ("pool", "table", "sentence"),
        [
            ("web", {}, "address: this key is required"),
            ("web", {"address": "nonsense"}, 'address: "nonsense" has no port'),
            ("web", {"address": 5}, "expected an address such as"),
            ("web", {"address": None}, "address: expected a value, found null"),
            ("web", {"address": "a:1", "id": None}, "id: expected a value, found null"),
            ("web", {"address": "a:1", "id": "x y"}, "expected a name of 1 to 128 visible characters"),
            ("web", {"address": "a:1", "id": ["x"]}, "id: expected a name"),
            ("web", {"address": "a:1", "weight": 65536}, "weight: expected a whole number from 0 to 65535"),
            ("web", {"address": "a:1", "weight": 1.5}, "weight: expected a whole number"),
            ("web", {"address": "a:1", "weight": True}, "weight: expected a whole number"),
            ("web", {"address": "a:1", "wieght": 1}, 'unknown key "wieght"'),
            ("web", {"addres": "a:1"}, 'unknown key "addres"'),
            ("web", {"address": "a:1", "tls": "yes"}, "tls: expected true or false"),
            (
                "web",
                {"address": "a:1", "tls_verify_peer": False},
                "tls_verify_peer has no effect on a clear-text",
            ),
            (
                "web",
                {"address": "a:1", "tls": True, "tls_cert_path": "/x"},
                "tls_cert_path needs tls_key_path",
            ),
            (
                "api",
                {"address": "a:1", "protocol": "h1"},
                "this backend speaks h1, the first of its pool tcp",
            ),
            ("names", {"address": "a:1", "tls": True}, "tls needs a connection"),
            ("names", {"address": "a:1", "send_proxy": "v2"}, "send_proxy needs a connection"),
            ("web", {"address": "a:1", "nested": {"a": {}}}, 'unknown key "nested"'),
        ],
    )
    def test_invalid(self, pool: str, table: Mapping[str, object], sentence: str) -> None:
        error = refused(AddBackend(pool, table))
        assert error.status == 422
        assert sentence in str(error)
        assert "backends[" not in str(error)

    def test_everything_wrong_is_told_at_once(self) -> None:
        error = refused(add("web", address="x", weight=-1, colour="red"))
        assert len(error.details) == 3

    def test_misspelt_key_is_not_also_missing(self) -> None:
        assert len(refused(add("web", addres="a:1")).details) == 1

    def test_what_this_version_cannot_do(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from expressgateway.config import availability

        row = availability.Later("pools.backends.send_proxy", "v1")
        monkeypatch.setattr(availability, "_ROWS", {row.key: (row,)})
        error = refused(add("web", address="a:1", send_proxy="v1"))
        assert error.details == ('not available in this version: send_proxy = "v1"',)
        after(add("web", address="a:1", send_proxy="v2"))

    def test_more_than_metrics_can_have(self) -> None:
        base = loaded(observability={"metrics_bind": "127.0.0.1:9090", "max_label_cardinality": 1700})
        for port in range(10000, 10096):
            base = changed(base, add("web", address=f"127.0.0.1:{port}"))
        error = refused(add("web", address="a:1"), base)
        assert error.status == 422
        assert "more than the 1700 allowed" in str(error)

    def test_one_protocol_for_a_pool(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from expressgateway.config import availability

        monkeypatch.setattr(availability, "_ROWS", {})
        error = refused(add("web", address="a:1", protocol="h2"))
        assert error.status == 422
        assert "this backend speaks h2, the first of its pool h1" in str(error)

    def test_protocol_of_the_first_is_asked_of_the_listener(self) -> None:
        base = after(RemoveBackend("api", "n1"))
        assert "relays bytes and cannot speak h1" in str(
            refused(add("api", address="a:1", protocol="h1"), base)
        )


class TestFiles:
    def test_are_read_and_relative_to_the_file(self, tmp_path: Path) -> None:
        write_certs(tmp_path)
        base = loaded(tmp_path)
        current = after(add("web", address="a:1", tls=True, tls_ca_path="certs/server.pem"), base=base)
        path = str(tmp_path / "certs" / "server.pem")
        assert current.material.files[path] == Path(path).read_bytes()
        assert "/certs/a" in current.material.files, "what was there stays"
        current = after(RemoveBackend("web", "a:1"), base=current)
        assert path not in current.material.files

    def test_shared_one_stays(self, tmp_path: Path) -> None:
        write_certs(tmp_path)
        tls = {"tls": True, "tls_ca_path": "certs/server.pem"}
        current = after(
            AddBackend("web", {"address": "a:1"} | tls),
            AddBackend("web", {"address": "a:2"} | tls),
            RemoveBackend("web", "a:1"),
            base=loaded(tmp_path),
        )
        assert str(tmp_path / "certs" / "server.pem") in current.material.files

    def test_absent_or_wrong(self, tmp_path: Path) -> None:
        write_certs(tmp_path)
        base = loaded(tmp_path)
        error = refused(add("web", address="a:1", tls=True, tls_ca_path="absent.pem"), base)
        assert error.status == 422
        assert "tls_ca_path: the file" in str(error)
        assert "does not exist" in str(error)
        swapped = add(
            "web",
            address="a:1",
            tls=True,
            tls_cert_path="certs/server.key",
            tls_key_path="certs/server.pem",
        )
        assert len(refused(swapped, base).details) == 2
        assert "look swapped" in str(refused(swapped, base))

    def test_key_permissions(self, tmp_path: Path) -> None:
        write_certs(tmp_path)
        (tmp_path / "certs" / "server.key").chmod(0o644)
        change = add(
            "web", address="a:1", tls=True, tls_cert_path="certs/server.pem", tls_key_path="certs/server.key"
        )
        base = loaded(tmp_path)
        assert "can be read by group or others" in str(refused(change, base))
        current = changed(base, change, insecure_key_permissions=True)
        assert ["can be read by group" in one.message for one in current.warnings] == [True]

    def test_warnings_are_of_this_change_alone(self) -> None:
        current = after(add("web", address="a:1", tls=True, tls_verify_peer=False))
        (warning,) = current.warnings
        assert 'run-time change: warning: tls_verify_peer: the certificate of "a:1" is not' in warning.text()
        assert after(SetWeight("web", "b1", 1), base=current).warnings == ()


class TestRemove:
    def test_removed(self) -> None:
        assert ids(after(RemoveBackend("web", "b1")), "web") == ["127.0.0.1:9001"]
        assert ids(after(RemoveBackend("web", "b1"), add("web", address="a:1", id="b1")), "web")[-1] == "b1"

    @pytest.mark.parametrize("pool", ["web", "api"])
    def test_pool_may_be_emptied_and_filled_again(self, pool: str) -> None:
        current = loaded()
        for id_ in ids(current, pool):
            current = changed(current, RemoveBackend(pool, id_))
        assert ids(current, pool) == []
        assert pool_read(current, pool).backends == ()
        assert refused(RemoveBackend(pool, "x"), current).status == 404
        assert weights(after(add(pool, address="a:1", weight=0), base=current), pool) == [0]
        current = after(add(pool, address="127.0.0.1:9009"), base=current)
        assert ids(current, pool) == ["127.0.0.1:9009"]
        new = backends_of(current.config)[pool][0]
        assert new.protocol == ("h1" if pool == "web" else "tcp"), "the listener is still known"

    def test_what_tunes_a_listeners_own_pool_stays(self) -> None:
        base = copy.deepcopy(BASE)
        base["listeners"][0]["load_balancing"] = {"policy": "weighted_round_robin"}
        current: Loaded = Loaded(Config.model_validate(base), Path("x.toml"))
        current = after(RemoveBackend("web", "b1"), RemoveBackend("web", "127.0.0.1:9001"), base=current)
        assert pool_read(current, "web").load_balancing.policy == "weighted_round_robin"
        current = after(add("web", address="a:1"), base=current)
        assert pool_read(current, "web").load_balancing.policy == "weighted_round_robin"

    @pytest.mark.parametrize(
        ("id_", "sentence"),
        [
            ("127.0.0.1:9002", 'has no backend "127.0.0.1:9002": the backends are b1, 127.0.0.1:9001'),
            ("bb1", 'pool web has no backend "bb1": did you mean "b1"?'),
            ("x", 'pool web has no backend "x": the backends are b1, 127.0.0.1:9001'),
            ("b1#10.0.0.1", '"b1#10.0.0.1" is an address that backend "b1" of pool web resolves to'),
            ("", "has no backend"),
        ],
    )
    def test_unknown(self, id_: str, sentence: str) -> None:
        for change in (RemoveBackend("web", id_), SetWeight("web", id_, 1)):
            error = refused(change)
            assert error.status == 404
            assert sentence in str(error)

    def test_id_with_a_hash_of_its_own(self) -> None:
        current = after(add("web", address="a:1", id="b1#x"))
        assert ids(after(RemoveBackend("web", "b1#x"), base=current), "web") == ["b1", "127.0.0.1:9001"]


class TestWeight:
    def test_set(self) -> None:
        current = after(SetWeight("web", "b1", 5), SetWeight("api", "n1", 65535))
        assert weights(current, "web") == [5, 1]
        assert weights(current, "api") == [65535]

    @pytest.mark.parametrize("weight", [-1, 65536, 1.0, "1", True, None, [], {}, 10**400])
    def test_invalid(self, weight: object) -> None:
        error = refused(SetWeight("web", "b1", weight))
        assert error.status == 422
        assert "weight: expected a whole number from 0 to 65535" in str(error)

    @pytest.mark.parametrize("pool", ["web", "api"])
    def test_all_may_be_zero(self, pool: str) -> None:
        current = loaded()
        for id_ in ids(current, pool):
            current = changed(current, SetWeight(pool, id_, 0))
        assert set(weights(current, pool)) == {0}
        assert [each.weight for each in pool_read(current, pool).backends] == weights(current, pool)
        current = after(add(pool, address="a:1", weight=0), base=current)  # and one more of them
        assert set(weights(current, pool)) == {0}
        current = after(SetWeight(pool, "a:1", 1), base=current)
        assert weights(current, pool)[-1] == 1
        assert [each.weight for each in pool_read(current, pool).backends] == weights(current, pool)


class TestAgainstTheFile:
    def test_first_configuration_is_kept(self) -> None:
        base = loaded()
        current = after(SetWeight("web", "b1", 5), RemoveBackend("api", "n1"), base=base)
        assert isinstance(current, Changed)
        assert current.filed is base.config

    def test_account(self) -> None:
        assert runtime_changes(loaded()) == {}
        current = after(
            SetWeight("web", "b1", 5),
            add("web", address="a:1", id="b9"),
            RemoveBackend("web", "127.0.0.1:9001"),
            RemoveBackend("api", "n1"),
        )
        assert runtime_changes(current) == {
            "web": ("weight of b1", "added b9", "removed 127.0.0.1:9001"),
            "api": ("removed n1",),
        }
        back = after(SetWeight("names", "d1", 5), SetWeight("names", "d1", 1))
        assert runtime_changes(back) == {}

    def test_replaced_under_the_same_id(self) -> None:
        current = after(RemoveBackend("web", "b1"), add("web", address="a:1", id="b1"))
        assert runtime_changes(current) == {"web": ("changed b1",)}


_tables = st.dictionaries(
    st.sampled_from([*Backend.model_fields, "x", ""]),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("a:1"),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
        max_leaves=4,
    ),
    max_size=5,
)


@given(st.sampled_from(["web", "api", "names"]), _tables)
def test_any_table_is_taken_or_refused(pool: str, table: dict[str, object]) -> None:
    base = loaded(Path("/nowhere"))
    current = None
    try:
        current = changed(base, AddBackend(pool, table))
    except ChangeError as error:
        refusal = error
    if current is None:
        assert refusal.status in (409, 422)
        assert str(refusal).isprintable()
    else:
        assert as_a_worker_reads_it(current).model_dump() == current.config.model_dump()
        assert not plan(base, current).is_empty


class TestPassthrough:
    """Mode A's backends are a pool of that name."""

    IDS: ClassVar[dict[str, Any]] = {
        "bind_addr": "127.0.0.1:443",
        "backends": [{"address": "127.0.0.1:1", "id": "0a"}],
        "cid_routing": {"config_id": 0, "server_id_length": 1},
    }

    def test_added_weighted_and_removed(self) -> None:
        base = loaded(passthrough={"bind_addr": "127.0.0.1:443", "backends": ["127.0.0.1:1"]})
        both = after(add("passthrough", address="127.0.0.1:2", weight=3), base=base)
        assert [each.id for each in backends_of(both.config)["passthrough"]] == ["127.0.0.1:1", "127.0.0.1:2"]
        weighted = after(SetWeight("passthrough", "127.0.0.1:2", 0), base=both)
        assert backends_of(weighted.config)["passthrough"][1].weight == 0
        none = after(
            RemoveBackend("passthrough", "127.0.0.1:1"),
            RemoveBackend("passthrough", "127.0.0.1:2"),
            base=weighted,
        )
        assert backends_of(none.config)["passthrough"] == ()
        # As it travels to workers: a pool may be empty at run time.
        again = Config.model_validate(none.config.model_dump(mode="json"), context={"rules_later": True})
        assert again == none.config

    @pytest.mark.parametrize(
        ("table", "sentence"),
        [
            ({"id": "backend-2"}, "its server id: 2 hexadecimal digits"),
            ({}, "its server id: 2 hexadecimal digits"),
            ({"id": "0b", "send_proxy": "v1"}, "send_proxy has no effect on QUIC that is passed through"),
        ],
    )
    def test_the_files_rules_hold(self, table: Mapping[str, object], sentence: str) -> None:
        with pytest.raises(ChangeError, match=sentence) as raised:
            after(add("passthrough", address="127.0.0.1:2", **table), base=loaded(passthrough=self.IDS))
        assert raised.value.status == 422

    def test_a_server_id(self) -> None:
        both = after(add("passthrough", address="127.0.0.1:2", id="0b"), base=loaded(passthrough=self.IDS))
        assert [each.id for each in backends_of(both.config)["passthrough"]] == ["0a", "0b"]
