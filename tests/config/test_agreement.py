"""What the configuration says of other rooms, held against them: what `check` passes must start."""

from collections.abc import Callable, Sequence
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from expressgateway.config import schema
from expressgateway.config.ciphers import parse_ciphers
from expressgateway.config.diagnose import ConfigError
from expressgateway.config.load import load
from expressgateway.config.values import BadValueError
from expressgateway.net.tls import CertificatePair, ServerTls, TlsConfigError, client_context
from expressgateway.observe.counters import BUCKETS_S, CLASSES, FAMILIES, VERSIONS
from expressgateway.proxy.errors import SECURITY_KINDS, Reason
from expressgateway.upstream.health_backend import EJECTION_CAUSES, STATES
from tests.config.material import certificate, key_pem, new_key, write
from tests.config.test_schema import config, listener


def is_accepted(work: Callable[[], object], error: type[Exception]) -> bool:
    try:
        work()
    except error:
        return False
    return True


@pytest.mark.parametrize(
    ("ciphers", "is_good"),
    [
        ("ECDHE+AESGCM", True),
        ("ECDHE+AESGCM:ECDHE+CHACHA20", True),
        ("ECDHE+AESGCM, ECDHE+CHACHA20", True),
        (" ECDHE+AESGCM ", True),
        ("HIGH:!aNULL:!eNULL:-SHA1:+AES256", True),
        ("ECDHE+AESGCM:@STRENGTH", True),
        ("ECDHE+AESGCM:@SECLEVEL=1", True),
        ("ECDHE+AESGCM:NONSENSE", False),
        ("ECDHE+AESGCM:ECDHE+NONSENSE", False),
        ("ECDHE+AESGCM:!NONSENSE", False),
        ("ECDHE+AESGCM:", False),
        ("ECDHE+AESGCM:@NONSENSE", False),
        ("TLS_AES_128_GCM_SHA256", False),
        ("ECDHE+AESGCM:TLS_AES_128_GCM_SHA256", False),
        ("ECDHE+AESGCM:!ALL", False),
        ("ALL:eNULL:@SECLEVEL=0", False),
        ("ADH-AES128-GCM-SHA256:@SECLEVEL=0", False),
        ("", False),
        (":", False),
        ("\u00e9", False),
    ],
)
def test_ciphers(ciphers: str, is_good: bool) -> None:
    assert is_accepted(lambda: parse_ciphers(ciphers), BadValueError) is is_good
    assert is_accepted(lambda: client_context(verify_peer=False, ciphers=ciphers), TlsConfigError) is is_good


def test_a_nul_is_no_cipher() -> None:
    with pytest.raises(BadValueError):
        parse_ciphers("ECDHE+AESGCM\0")


EC, OTHER_EC = new_key(), new_key()
RSA = rsa.generate_private_key(65537, 2048)


def dns(*names: str) -> tuple[x509.GeneralName, ...]:
    return tuple(map(x509.DNSName, names))


def ips(*names: str) -> tuple[x509.GeneralName, ...]:
    return tuple(x509.IPAddress(ip_address(name)) for name in names)


Site = tuple[ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey, Sequence[x509.GeneralName]]

HEAD = """\
[[listeners]]
address = "127.0.0.1:8443"
protocol = "h1s"
backends = [{ address = "127.0.0.1:3000" }]
tls = { cert_path = "0.pem", key_path = "0.key", certificates = [
"""


@pytest.mark.parametrize(
    ("sites", "is_good"),
    [
        ([(EC, dns("a.test")), (OTHER_EC, dns("b.test"))], True),
        ([(EC, dns("a.test")), (OTHER_EC, dns("a.test", "b.test"))], True),
        ([(EC, dns("a.test")), (RSA, dns("a.test"))], True),
        ([(EC, dns("a.test")), (OTHER_EC, dns("a.test"))], False),
        ([(EC, dns("a.test")), (RSA, dns("a.test")), (OTHER_EC, dns("a.test"))], False),
        ([(RSA, dns("a.test")), (EC, dns("b.test")), (RSA, dns("a.test"))], False),
        ([(EC, dns("a.test", "b.test")), (OTHER_EC, dns("B.test", "A.test"))], False),
        ([(EC, ips("127.0.0.1", "::1")), (OTHER_EC, ips("::1", "127.0.0.1"))], False),
        ([(EC, ips("127.0.0.1")), (OTHER_EC, dns("a.test"))], True),
        ([(EC, ()), (OTHER_EC, ())], False),
        ([(EC, ()), (OTHER_EC, dns("test.example"))], False),  # the common name of the first
        ([(EC, ()), (OTHER_EC, [x509.UniformResourceIdentifier("a://b")])], False),
    ],
)
def test_certificates_of_one_listener(sites: list[Site], is_good: bool, tmp_path: Path) -> None:
    pairs = []
    for number, (key, names) in enumerate(sites):
        pair = CertificatePair(certificate(key, names=names), key_pem(key))
        write(tmp_path / f"{number}.pem", pair.cert_pem)
        write(tmp_path / f"{number}.key", pair.key_pem)
        pairs.append(pair)
    more = ",\n".join(
        f'{{ cert_path = "{number}.pem", key_path = "{number}.key" }}' for number in range(1, len(sites))
    )
    path = tmp_path / "gateway.toml"
    path.write_text(f"{HEAD}{more}] }}\n")
    assert is_accepted(lambda: ServerTls(pairs), TlsConfigError) is is_good
    if is_good:
        assert load(path).warnings == ()
        return
    with pytest.raises(ConfigError) as caught:
        load(path)
    (found,) = caught.value.diagnostics
    assert found.key == f"listeners[0].tls.certificates[{len(sites) - 2}].cert_path"
    assert "is for the same names as" in found.message


def test_two_listeners_may_have_the_same_certificate(tmp_path: Path) -> None:
    write(tmp_path / "0.pem", certificate(EC))
    write(tmp_path / "0.key", key_pem(EC))
    path = tmp_path / "gateway.toml"
    path.write_text(f"{HEAD}] }}\n{HEAD.replace('8443', '8444')}] }}\n")
    assert load(path).warnings == ()


class TestSeries:
    def test_labels_have_no_more_values_than_are_counted(self) -> None:
        assert len(CLASSES) == schema.STATUS_CLASSES
        secured = {"cert_path": "a", "key_path": "b"}
        over_tls = config(listener(protocol="h1s", tls=secured)).listeners[0]
        over_quic = config(listener(protocol="quic", quic={**secured, "retry_secret_path": "c"})).listeners[0]
        assert len(VERSIONS) == over_tls.http_versions + over_quic.http_versions
        assert len(BUCKETS_S) + 1 + 2 == schema.HISTOGRAM_SERIES  # and +Inf; sum and count
        assert len(Reason) <= schema.GATEWAY_ERRORS
        assert len(SECURITY_KINDS) < schema.SECURITY_EVENT_KINDS
        assert len(STATES) == schema.BACKEND_STATES

    def test_what_is_counted_per_pool_is_less_than_what_is_counted_per_backend(self) -> None:
        """Such metrics are left out: a pool has a backend, and a backend's metrics have more labels."""
        limits = [key for key in schema.CircuitBreaker.model_fields if key != "pending_timeout_ms"]
        assert len(limits) < schema.STATUS_CLASSES
        assert len(EJECTION_CAUSES) < schema.STATUS_CLASSES
        pooled = [name for name, each in FAMILIES.items() if "pool" in each.labels]
        counted = ("pool_connections", "backend_requests", "backend_state", "backend_ejections")
        others = {FAMILIES[name].labels[-1] for name in pooled if name not in counted}
        # Closed sets of a few words each, and none of them is per backend.
        assert others == {"pool", "backend", "reason", "limit", "result"}

    def test_metrics_are_those_that_are_counted(self) -> None:
        names = {f"{name}_total" if each.kind == "counter" else name for name, each in FAMILIES.items()}
        assert config().series().keys() <= names

    def test_every_histogram_is_counted(self) -> None:
        histograms = {name for name, each in FAMILIES.items() if each.kind == "histogram"}
        assert histograms <= config().series().keys()

    def test_numbers(self) -> None:
        backends = [{"address": f"app-{number}.example:80"} for number in range(20)]
        built = config(
            listener(backends=backends),
            listener(address="127.0.0.1:1"),
            listener(address="127.0.0.1:2", protocol="tcp"),
            runtime={"workers": 3},
        )
        series = built.series()
        assert series == {
            "backend_request_duration_seconds": 22 * 17,
            "backend_connect_duration_seconds": 22 * 17,
            "backend_head_duration_seconds": 22 * 17,
            "security_events_total": 3 * 64,
            "backend_requests_total": 22 * 6,
            "backend_state": 22 * 6,
            "http_request_duration_seconds": 2 * 2 * 17,
            "http_gateway_errors_total": 2 * 48,
            "pool_connections": 22 * 2,
            "relay_errors_total": 1 * 48,
            "http_requests_total": 2 * 2 * 6,
            "worker_up": 3,
        }
        assert list(series.values()) == sorted(series.values(), reverse=True)

    def test_each_route_counts_and_so_does_what_none_matches(self) -> None:
        answers = [{"match": {"path": f"/{number}"}, "respond": {"status": 204}} for number in range(9)]
        series = config(listener(routes=answers), listener(address="127.0.0.1:1")).series()
        assert series["http_requests_total"] == (10 + 1) * 2 * 6
        assert series["http_request_duration_seconds"] == (10 + 1) * 2 * 17
        assert series["http_gateway_errors_total"] == 2 * 48

    def test_listeners_that_speak_http2_count_one_more_version(self) -> None:
        answers = [{"match": {"path": f"/{number}"}, "respond": {"status": 204}} for number in range(9)]
        tls = {"cert_path": "a", "key_path": "b"}
        series = config(
            listener(routes=answers, h2c=True), listener(address="127.0.0.1:1", protocol="h1s", tls=tls)
        ).series()
        assert series["http_requests_total"] == (10 + 1) * 3 * 6

    def test_one_over_quic_has_one_version(self) -> None:
        quic = {"cert_path": "a", "key_path": "b", "retry_secret_path": "c"}
        assert config(listener(protocol="quic", quic=quic)).series()["http_requests_total"] == 6

    def test_backends_of_named_pools_count(self) -> None:
        pool = {"name": "app", "backends": [{"address": f"127.0.0.1:{port}"} for port in range(1, 8)]}
        routes = [{"split": [{"pool": "app"}]}]
        series = config(listener(backends=[], routes=routes), pools=[pool]).series()
        assert (series["backend_state"], series["backend_requests_total"]) == (7 * 6, 7 * 6)
