"""Certificates under a running gateway, with files that are real and a supervisor that is not."""

from __future__ import annotations

import asyncio
import logging
import os
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from cryptography import x509

from expressgateway.config.load import Loaded, load
from expressgateway.control.certificate_facts import DAY_S
from expressgateway.control.certificates import LOOK_S, RETRY_S, Certificates
from expressgateway.control.reload import APPLIED, FAILED, Outcome
from expressgateway.observe.counters import SUPERVISOR_FAMILIES
from tests.config.material import certificate, key_pem, new_key, ocsp_response, write

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from pathlib import Path

CONFIG = """
[[listeners]]
name = "web"
address = "127.0.0.1:8443"
protocol = "h1s"
backends = [{ address = "127.0.0.1:9" }]
[listeners.tls]
cert_path = "a.pem"
key_path = "a.key"
ocsp_path = "a.ocsp"
certificates = [{ cert_path = "b.pem", key_path = "b.key" }]

[[listeners]]
name = "h3"
address = "127.0.0.1:8443"
protocol = "quic"
pool = "apps"
quic = { cert_path = "a.pem", key_path = "a.key", retry_secret_path = "retry" }

[[pools]]
name = "apps"
[[pools.backends]]
address = "127.0.0.1:9"
id = "one"
tls = true
tls_cert_path = "c.pem"
tls_key_path = "c.key"
tls_verify_peer = false
"""


class Gateway:
    """What the supervisor is to `Certificates`. Time passes when the test says so."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.now = 1000.0
        self.wall = datetime.now(UTC).timestamp()
        self.wakes = 0
        self.applied: list[str] = []
        self.refuses: set[str] = set()
        """Files that workers cannot use."""
        for name in "abc":
            self.pair(name)
        self.staple()
        config = write(directory / "gateway.toml", CONFIG.encode())
        self.loaded: Loaded = load(config)
        self.certificates = Certificates(
            lambda: self.loaded, self._woken, clock=lambda: self.now, wall=lambda: self.wall
        )

    def _woken(self) -> None:
        self.wakes += 1

    async def apply(self, loaded: Loaded, report: str) -> Outcome:
        self.applied.append(report)
        running = self.loaded.material.files
        new = {
            path.rpartition("/")[2] for path, data in loaded.material.files.items() if running[path] != data
        }
        if bad := self.refuses & new:
            return Outcome(FAILED, (f"a worker cannot use {sorted(bad)}",))
        assert loaded.config is self.loaded.config
        self.loaded = loaded
        return Outcome(APPLIED, (report,))

    # -- files

    def pair(self, name: str, *, days: float = 90, parts: str = "both") -> tuple[bytes, bytes]:
        """Another pair under these names, of which ``parts`` are written: both, cert or key."""
        key = new_key()
        ends = datetime.fromtimestamp(self.wall, UTC) + timedelta(days=days)
        made = certificate(
            key, names=[x509.DNSName(f"{name}.example")], begins=ends - timedelta(days=100), ends=ends
        )
        if parts != "key":
            write(self.directory / f"{name}.pem", made)
        if parts != "cert":
            write(self.directory / f"{name}.key", key_pem(key))
        self.key = key
        return made, key_pem(key)

    def staple(self, *, days: float = 3) -> None:
        pem, _ = self.pair("a")
        ends = datetime.fromtimestamp(self.wall, UTC) + timedelta(days=days)
        begins = ends - timedelta(days=10)
        write(self.directory / "a.ocsp", ocsp_response(pem, self.key, begins=begins, ends=ends))

    def running(self, name: str) -> bytes:
        return self.loaded.material.files[str(self.directory / name)]

    def is_running(self, name: str) -> bool:
        """Whether what is in the file runs."""
        return self.running(name) == (self.directory / name).read_bytes()

    # -- time

    async def pass_looks(self, number: int) -> None:
        """Looks at the files, with the renewals that they ask for."""
        for _ in range(number):
            self.now += LOOK_S
            self.wall += LOOK_S
            await self.certificates.look()
            await self.work()

    async def work(self) -> None:
        """As the supervisor's loop does."""
        if self.certificates.is_due:
            await self.certificates.renew(self.apply)

    async def ask(self) -> None:
        self.certificates.ask()
        await self.work()

    # -- what is seen

    def shown(self, chain: str) -> dict[str, Any]:
        return next(each for each in self.certificates.describe() if each["cert_path"].endswith(chain))

    def sample(self, family: str, *labels: str) -> float:
        for name, found, value in self.certificates.samples():
            if name == family and found == labels:
                assert not isinstance(value, list)
                return value
        raise AssertionError(f"there is no {family} {labels}")


@pytest.fixture
def gateway(tmp_path: Path) -> Gateway:
    return Gateway(tmp_path)


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(test())


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.levelno >= logging.ERROR]


class TestAsked:
    def test_what_is_new_runs(self, gateway: Gateway) -> None:
        async def test() -> None:
            gateway.pair("b")
            await gateway.ask()
            assert gateway.is_running("b.pem")
            assert gateway.sample("certificate_reload", "renewed") == 1
            assert not gateway.certificates.is_due

        run(test)

    def test_nothing_is_new(self, gateway: Gateway, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO)
        run(gateway.ask)
        assert gateway.applied == []
        assert "none has changed" in caplog.text

    def test_many_times_at_once_is_once(self, gateway: Gateway, caplog: pytest.LogCaptureFixture) -> None:
        async def test() -> None:
            caplog.set_level(logging.INFO)
            for _ in range(100):
                gateway.certificates.ask()
            await gateway.work()
            assert not gateway.certificates.is_due
            assert caplog.text.count("SIGUSR1") == 1

        run(test)

    def test_during_a_renewal_is_done_after_it(self, gateway: Gateway) -> None:
        async def test() -> None:
            gateway.certificates.ask()
            renewing = asyncio.ensure_future(gateway.certificates.renew(gateway.apply))
            await asyncio.sleep(0)  # its files are being read
            gateway.certificates.ask()
            await renewing
            assert gateway.certificates.is_due
            await gateway.work()
            assert not gateway.certificates.is_due

        run(test)

    def test_a_bad_pair_is_told_of_at_once(self, gateway: Gateway, caplog: pytest.LogCaptureFixture) -> None:
        async def test() -> None:
            gateway.pair("a", parts="cert")
            gateway.pair("b")
            await gateway.ask()
            assert gateway.is_running("b.pem")
            assert not gateway.is_running("a.pem")
            (told,) = errors(caplog)
            assert 'a.pem" (listener web, listener h3) is not renewed, the old one stays: the key' in told
            assert gateway.sample("certificate_reload", "failed") == 1
            assert gateway.sample("certificate_reload_failing") == 1
            await gateway.ask()
            assert len(errors(caplog)) == 2, "who asks is answered"

        run(test)


class TestRefused:
    """By workers, which may know more of a certificate than the supervisor."""

    def test_the_others_are_renewed(self, gateway: Gateway, caplog: pytest.LogCaptureFixture) -> None:
        async def test() -> None:
            gateway.refuses = {"b.pem"}
            for name in "abc":
                gateway.pair(name)
            await gateway.ask()
            assert gateway.is_running("a.pem")
            assert gateway.is_running("c.pem")
            assert not gateway.is_running("b.pem")
            (told,) = errors(caplog)
            assert "b.pem" in told
            assert "a worker cannot use" in told

        run(test)

    def test_it_is_not_offered_again_at_every_look(self, gateway: Gateway) -> None:
        async def test() -> None:
            await gateway.pass_looks(2)
            gateway.refuses = {"b.pem"}
            gateway.pair("b")
            await gateway.pass_looks(5)
            assert len(gateway.applied) == 1
            gateway.now += RETRY_S
            await gateway.pass_looks(1)
            assert len(gateway.applied) == 2
            gateway.pair("b")
            await gateway.pass_looks(1)
            assert len(gateway.applied) == 3, "another one is"
            gateway.refuses = set()
            gateway.now += RETRY_S
            await gateway.pass_looks(1)
            assert gateway.is_running("b.pem")
            assert gateway.sample("certificate_reload_failing") == 0

        run(test)


class TestWatched:
    def test_a_change_is_seen(self, gateway: Gateway) -> None:
        async def test() -> None:
            await gateway.pass_looks(3)
            assert gateway.applied == []
            woken = gateway.wakes
            await gateway.pass_looks(1)
            assert gateway.wakes == woken, "nothing is read again for nothing"
            gateway.pair("b")
            await gateway.pass_looks(1)
            assert gateway.wakes > woken
            assert gateway.is_running("b.pem")

        run(test)

    def test_a_change_before_the_first_look_is_seen_too(self, gateway: Gateway) -> None:
        async def test() -> None:
            gateway.pair("b")
            await gateway.pass_looks(1)
            assert gateway.is_running("b.pem")

        run(test)

    def test_a_file_that_is_renamed_over(self, gateway: Gateway) -> None:
        async def test() -> None:
            await gateway.pass_looks(2)
            made, key = gateway.pair("b", parts="none")
            for name, data in (("b.pem", made), ("b.key", key)):
                os.replace(write(gateway.directory / "new", data), gateway.directory / name)
            await gateway.pass_looks(1)
            assert gateway.running("b.pem") == made

        run(test)

    def test_a_directory_that_is_swapped(self, tmp_path: Path) -> None:
        """As Kubernetes does it: the files are links to ``..data/``, itself a link that is replaced."""
        gateway = Gateway(tmp_path)

        def publish(name: str) -> bytes:
            made, key = gateway.pair("b", parts="none")
            write(tmp_path / name / "b.pem", made)
            write(tmp_path / name / "b.key", key)
            (tmp_path / "..data_tmp").symlink_to(name)
            os.replace(tmp_path / "..data_tmp", tmp_path / "..data")
            return made

        async def test() -> None:
            publish("..1")
            for name in ("b.pem", "b.key"):
                (tmp_path / name).unlink()
                (tmp_path / name).symlink_to(f"..data/{name}")
            gateway.loaded = load(tmp_path / "gateway.toml")
            await gateway.pass_looks(2)
            assert gateway.applied == []
            made = publish("..2")
            await gateway.pass_looks(1)
            assert gateway.running("b.pem") == made

        run(test)

    def test_half_a_pair_is_nothing_to_tell(self, gateway: Gateway, caplog: pytest.LogCaptureFixture) -> None:
        async def test() -> None:
            await gateway.pass_looks(2)
            made, key = gateway.pair("b", parts="cert")
            await gateway.pass_looks(1)
            assert gateway.running("b.pem") != made
            assert gateway.sample("certificate_reload_failing") == 0
            write(gateway.directory / "b.key", key)
            await gateway.pass_looks(1)
            assert gateway.running("b.pem") == made
            assert errors(caplog) == []

        run(test)

    def test_half_a_pair_that_stays_is_told_of_once(
        self, gateway: Gateway, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def test() -> None:
            await gateway.pass_looks(2)
            _, key = gateway.pair("b", parts="cert")
            await gateway.pass_looks(100)
            assert len(errors(caplog)) == 1
            assert gateway.sample("certificate_reload", "failed") == 1
            assert gateway.shown("b.pem")["is_failing"]
            write(gateway.directory / "b.key", key)
            await gateway.pass_looks(1)
            assert gateway.is_running("b.pem")
            shown = gateway.shown("b.pem")
            assert not shown["is_failing"]
            assert "does not belong" in shown["last_failure"]["reason"]
            assert shown["last_renewal"] == gateway.wall

        run(test)

    def test_a_file_that_is_bad_in_ever_other_ways_floods_no_log(
        self, gateway: Gateway, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def test() -> None:
            await gateway.pass_looks(2)
            for number in range(60):
                if number % 2:
                    (gateway.directory / "b.key").unlink()
                else:
                    gateway.pair("b", parts="key")
                await gateway.pass_looks(1)
            assert 1 <= len(errors(caplog)) <= 1 + 60 * LOOK_S / RETRY_S

        run(test)

    def test_a_key_that_becomes_private_is_fine(self, gateway: Gateway) -> None:
        """Its content is the same as before: what it may be read by has changed."""

        async def test() -> None:
            gateway.pair("b")
            (gateway.directory / "b.key").chmod(0o644)
            await gateway.pass_looks(4)
            assert not gateway.is_running("b.pem")
            (gateway.directory / "b.key").chmod(0o600)
            await gateway.pass_looks(1)
            assert gateway.is_running("b.pem")

        run(test)

    def test_files_that_a_reload_names_are_watched_too(self, gateway: Gateway) -> None:
        async def test() -> None:
            await gateway.pass_looks(2)
            made = certificate(key := new_key())
            write(gateway.directory / "d.pem", made)
            write(gateway.directory / "d.key", key_pem(key))
            path = gateway.directory / "gateway.toml"
            path.write_text(path.read_text().replace("b.pem", "d.pem").replace("b.key", "d.key"))
            gateway.loaded = load(path)
            await gateway.pass_looks(2)
            assert [each["cert_path"][-5:] for each in gateway.certificates.describe()] == [
                "a.pem",
                "d.pem",
                "a.pem",
                "c.pem",
            ]
            write(gateway.directory / "d.key", key_pem(key := new_key()))
            write(gateway.directory / "d.pem", certificate(key))
            await gateway.pass_looks(1)
            assert gateway.is_running("d.pem")

        run(test)


class TestStaples:
    def test_one_that_runs_out_is_taken_away(
        self, gateway: Gateway, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def test() -> None:
            await gateway.pass_looks(2)
            assert gateway.sample("certificate_ocsp_stapled", "web", "CN=test.example") == 1
            assert gateway.shown("a.pem")["ocsp"]["is_stapled"]
            gateway.wall += 4 * DAY_S
            monkeypatch.setattr("expressgateway.config.material.datetime", later(gateway))
            await gateway.pass_looks(20)
            assert gateway.running("a.ocsp") == b""
            assert not gateway.shown("a.pem")["ocsp"]["is_stapled"]
            assert gateway.sample("certificate_ocsp_stapled", "web", "CN=test.example") == 0
            assert caplog.text.count("was good until") == 1

        run(test)

    def test_a_new_one_is_no_new_certificate(
        self, gateway: Gateway, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def test() -> None:
            caplog.set_level(logging.INFO)
            write(gateway.directory / "a.ocsp", ocsp_response(gateway.running("a.pem"), gateway.key))
            await gateway.pass_looks(1)
            assert gateway.is_running("a.ocsp")
            assert "OCSP responses read anew" in caplog.text
            assert gateway.sample("certificate_reload", "renewed") == 0
            assert gateway.shown("a.pem")["last_renewal"] is None

        run(test)


def later(gateway: Gateway) -> type[datetime]:
    class Later(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Later:
            return cls.fromtimestamp(gateway.wall, tz)

    return Later


class TestEnds:
    def warned(self, caplog: pytest.LogCaptureFixture) -> list[tuple[int, str]]:
        found = [
            (each.levelno, each.getMessage())
            for each in caplog.records
            if "ends in" in each.getMessage() or "expired on" in each.getMessage()
        ]
        caplog.clear()
        return found

    def test_once_for_each_stage_and_daily(self, gateway: Gateway, caplog: pytest.LogCaptureFixture) -> None:
        async def test() -> None:
            # a, b and c live for 100 days, of which 90 are left
            await gateway.pass_looks(40)
            assert self.warned(caplog) == []
            gateway.wall += 61 * DAY_S
            await gateway.pass_looks(40)
            found = self.warned(caplog)
            assert len(found) == 3, "one for each certificate, however many use it"
            assert found[0][0] == logging.WARNING
            assert 'a.pem" (listener web, listener h3) ends in 28 days, on ' in found[0][1]
            gateway.wall += DAY_S / 2
            await gateway.pass_looks(40)
            assert self.warned(caplog) == []
            gateway.wall += DAY_S / 2
            await gateway.pass_looks(40)
            assert len(self.warned(caplog)) == 3, "a day later"
            gateway.wall += 21.9 * DAY_S
            await gateway.pass_looks(40)
            assert "ends in 6 days" in self.warned(caplog)[0][1]
            gateway.wall += 7 * DAY_S
            await gateway.pass_looks(40)
            level, text = self.warned(caplog)[0]
            assert level == logging.ERROR
            assert "expired on" in text
            assert "clients refuse it" in text

        run(test)

    def test_a_renewed_one_is_fine(self, gateway: Gateway, caplog: pytest.LogCaptureFixture) -> None:
        async def test() -> None:
            gateway.wall += 61 * DAY_S
            await gateway.pass_looks(2)
            gateway.pair("b")
            await gateway.pass_looks(2)
            self.warned(caplog)
            gateway.wall += DAY_S
            await gateway.pass_looks(40)
            assert [text[-60:] for _, text in self.warned(caplog) if "b.pem" in text] == []

        run(test)


class TestShown:
    def test_what_the_api_shows(self, gateway: Gateway) -> None:
        shown = gateway.certificates.describe()
        assert [(each["listener"], each["pool"], each["backend"]) for each in shown] == [
            ("web", None, None),
            ("web", None, None),
            ("h3", None, None),
            (None, "apps", "one"),
        ]
        facts = shown[1]
        assert facts["names"] == ["b.example"]
        assert facts["subject"] == facts["issuer"] == "CN=test.example"
        assert facts["days_left"] == pytest.approx(90, abs=0.1)
        assert facts["state"] == "fine"
        assert (facts["ocsp"], facts["last_renewal"], facts["last_failure"]) == (None, None, None)
        assert facts["cert_path"] == str(gateway.directory / "b.pem")
        assert "PRIVATE" not in repr(shown)

    def test_samples_are_those_of_the_catalogue(self, gateway: Gateway) -> None:
        for name, labels, _ in gateway.certificates.samples():
            assert len(SUPERVISOR_FAMILIES[name].labels) == len(labels)

    def test_two_certificates_with_one_subject_count_as_the_earlier_end(self, gateway: Gateway) -> None:
        async def test() -> None:
            gateway.pair("b", days=10)
            await gateway.ask()
            end = gateway.sample("certificate_expiry_timestamp_seconds", "web", "CN=test.example")
            assert end == gateway.shown("b.pem")["not_after"]

        run(test)

    def test_a_reload_with_new_content_is_a_renewal(self, gateway: Gateway) -> None:
        gateway.certificates.describe()
        gateway.pair("b")
        gateway.loaded = load(gateway.directory / "gateway.toml")
        assert gateway.shown("b.pem")["last_renewal"] == gateway.wall
        assert gateway.shown("c.pem")["last_renewal"] is None

    def test_a_change_of_something_else_is_none(self, gateway: Gateway) -> None:
        gateway.certificates.describe()
        gateway.loaded = replace(gateway.loaded)
        assert gateway.shown("b.pem")["last_renewal"] is None
