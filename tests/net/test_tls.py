"""TLS contexts against openssl s_client and curl; in memory where they cannot say what is tested."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import ssl
import subprocess
import sys
import threading
import weakref
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from expressgateway.net import tls
from expressgateway.net.tls import CertificatePair, ServerTls, TlsConfigError, client_context
from expressgateway.net.tls_stream import is_ragged_eof
from tests.net.tls_peers import (
    alice,
    ca,
    handshake,
    issue,
    memory_files,
    needs_curl,
    needs_openssl,
    rsa_site,
    s_client,
    serving,
    site,
    trusting,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


# --- choosing a certificate ---------------------------------------------------------------------------------


def three_hosts() -> ServerTls:
    return ServerTls(
        [
            site("a.test", "www.a.test", "shared.test", "192.0.2.1", "2001:db8::1").pair,
            site("b.test", "*.b.test", "shared.test").pair,
            site("x.b.test").pair,
        ]
    )


class TestServerName:
    @pytest.mark.parametrize(
        ("sni", "expected"),
        [
            ("a.test", "a.test"),
            ("WWW.A.Test", "a.test"),
            ("b.test", "b.test"),
            ("any.b.test", "b.test"),
            ("x.b.test", "x.b.test"),  # exact before wildcard
            ("two.labels.b.test", "a.test"),  # a wildcard is one label
            (".b.test", "a.test"),
            ("unknown.test", "a.test"),
            (None, "a.test"),
        ],
    )
    def test_chooses_the_certificate(self, sni: str | None, expected: str) -> None:
        server = three_hosts()
        assert expected in server.names_for(sni)
        client = trusting()
        client.check_hostname = False
        if sni is not None and sni.startswith("."):
            return  # Python's client refuses to send it
        near, far = handshake(server.context, client, sni)
        certificate = far.getpeercert()
        assert certificate is not None
        assert certificate["subject"] == ((("commonName", expected),),)
        assert tls.sni_of(near) == (sni.lower() if sni else None)

    @needs_openssl
    def test_openssl_is_given_the_certificate_it_names(self) -> None:
        with serving(three_hosts().context) as (port, seen):
            assert "subject=CN = b.test" in s_client(port, "-servername", "Foo.B.test")
            assert seen.get(timeout=60).sni == "foo.b.test"
            assert "subject=CN = a.test" in s_client(port, "-noservername")
            assert seen.get(timeout=60).sni is None

    @needs_curl
    def test_curl_verifies_the_host_it_names(self, tmp_path: Path) -> None:
        (tmp_path / "ca.pem").write_bytes(ca().pem)
        with serving(three_hosts().context, reads=True) as (port, seen):
            curl = [
                "curl",
                "-sS",
                "--cacert",
                str(tmp_path / "ca.pem"),
                "--connect-to",
                f"::127.0.0.1:{port}",
            ]
            done = subprocess.run(
                [*curl, "https://deep.b.test/"], capture_output=True, timeout=60, check=False
            )
            assert (done.returncode, done.stdout) == (0, b"yes"), done.stderr
            assert seen.get(timeout=60).sni == "deep.b.test"
            done = subprocess.run([*curl, "https://c.test/"], capture_output=True, timeout=60, check=False)
            assert done.returncode == 60, done.stderr  # verification failed: it got the default

    def test_common_name_counts_only_without_alternative_names(self) -> None:
        server = ServerTls([site("a.test").pair, issue("cn.test", issuer=ca()).pair])
        assert server.names_for("cn.test") == {"cn.test"}
        server = ServerTls([site("a.test").pair, issue("cn.test", "san.test", issuer=ca()).pair])
        assert server.names_for("cn.test") == {"a.test"}

    def test_a_name_stays_readable_on_a_socket(self) -> None:
        with serving(three_hosts().context) as (port, seen):
            raw = socket.create_connection(("127.0.0.1", port))
            with trusting().wrap_socket(raw, server_hostname="b.test") as connection:
                assert connection.recv(100)
            assert seen.get(timeout=60).sni == "b.test"

    def test_two_key_types_for_the_same_names_serve_both(self) -> None:
        server = ServerTls([rsa_site("a.test").pair, site("a.test").pair])
        suites = []
        for ciphers in ("ECDHE-RSA-AES128-GCM-SHA256", "ECDHE-ECDSA-AES128-GCM-SHA256"):
            client = trusting(ciphers=ciphers)
            client.maximum_version = ssl.TLSVersion.TLSv1_2
            suite = handshake(server.context, client)[1].cipher()
            assert suite is not None
            suites.append(suite[0].split("-")[1])
        assert suites == ["RSA", "ECDSA"]
        assert not server.is_misdirected("a.test", "a.test")

    def test_a_name_that_is_not_ascii_is_counted_without_a_traceback(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        counted: list[int] = []
        others: list[object] = []
        monkeypatch.setattr(sys, "unraisablehook", others.append)
        tls.count_bad_sni(lambda: counted.append(1))
        to_server, from_server = ssl.MemoryBIO(), ssl.MemoryBIO()
        hello = ssl.MemoryBIO()
        with pytest.raises(ssl.SSLWantReadError):
            trusting().wrap_bio(ssl.MemoryBIO(), hello, server_hostname="abcd.test").do_handshake()
        to_server.write(hello.read().replace(b"abcd", b"ab\xffd"))
        with pytest.raises(ssl.SSLError, match="CALLBACK_FAILED"):
            three_hosts().context.wrap_bio(to_server, from_server, server_side=True).do_handshake()
        assert (counted, others) == ([1], [])

    def test_a_reload_in_the_middle_of_a_handshake_harms_nothing(self) -> None:
        servers = [three_hosts()]
        context = weakref.ref(servers[0].context)

        def reload() -> None:
            servers.clear()
            gc.collect()

        near, _ = handshake(servers[0].context, trusting(), "b.test", between=reload)
        # OpenSSL goes on calling into the first context; it may not be freed before the connection.
        assert context() is not None
        del near
        assert context() is None


class TestMisdirected:
    """RFC 9110 15.5.20, RFC 9113 9.1.2."""

    @pytest.mark.parametrize(
        ("sni", "host", "expected"),
        [
            ("a.test", "a.test", False),
            ("a.test", "A.TEST.", False),
            ("a.test", "a.test:8443", False),
            ("a.test", "www.a.test", False),  # one certificate, several names
            ("a.test", "b.test", True),
            ("a.test", "any.b.test:443", True),
            ("b.test", "a.test", True),
            ("b.test", "foo.b.test", False),
            ("foo.b.test", "bar.b.test", False),
            ("foo.b.test", "x.b.test", False),  # b.test's wildcard covers it too
            ("x.b.test", "foo.b.test", True),
            ("b.test", "shared.test", False),  # named by both
            ("x.b.test", "shared.test", True),
            ("a.test", "unknown.test", False),
            ("b.test", "unknown.test", False),
            ("unknown.test", "a.test", False),  # an unknown name was given the default
            ("unknown.test", "b.test", True),
            (None, "b.test", False),
            ("a.test", "192.0.2.1", False),
            ("b.test", "192.0.2.1:80", True),
            ("b.test", "[2001:DB8:0::1]:443", True),
            ("b.test", "[2001:db8::2]", False),
            ("A.test.", "b.test", True),
            ("a.test", "", False),
            ("a.test", ":", False),
            ("a.test", "[", False),
            ("a.test", "1:2:3", False),
        ],
    )
    def test_host_of_another_virtual_host(self, sni: str | None, host: str, expected: bool) -> None:
        assert three_hosts().is_misdirected(sni, host) is expected

    def test_never_with_one_certificate(self) -> None:
        assert not ServerTls([site("a.test").pair]).is_misdirected("a.test", "b.test")


# --- versions, suites, options ------------------------------------------------------------------------------


class TestProtocol:
    @needs_openssl
    @pytest.mark.parametrize(
        ("settings", "flag", "accepted"),
        [
            ({}, "-tls1_1", False),
            ({}, "-tls1_2", True),
            ({}, "-tls1_3", True),
            ({"tls13_only": True}, "-tls1_2", False),
            ({"min_version": "1.3"}, "-tls1_2", False),
            ({"tls13_only": True}, "-tls1_3", True),
        ],
    )
    def test_versions(self, settings: dict[str, object], flag: str, accepted: bool) -> None:
        server = ServerTls([site("a.test").pair], **settings)  # type: ignore[arg-type]  # rows of a table
        with serving(server.context) as (port, seen):
            # SECLEVEL 0: or s_client itself would not offer TLS 1.1.
            said = s_client(port, flag, "-cipher", "ALL:@SECLEVEL=0")
            error = seen.get(timeout=60).error
            assert ("\nNew, TLSv1" in said and error is None) is accepted, said
            if not accepted:
                assert "alert protocol version" in said
                assert error is not None
                assert "UNSUPPORTED_PROTOCOL" in error

    @needs_openssl
    def test_renegotiation_is_refused(self) -> None:
        server = ServerTls([site("a.test").pair])
        server.context.options |= 1 << 8  # SSL_OP_ALLOW_CLIENT_RENEGOTIATION: or OpenSSL 3 refuses by itself
        with serving(server.context, reads=True) as (port, _):
            said = s_client(port, "-tls1_2", stdin=b"R\n")
            assert "RENEGOTIATING" in said
            assert "no renegotiation" in said

    def test_no_compression(self) -> None:
        for context in (ServerTls([site("a.test").pair]).context, trusting()):
            assert context.options & ssl.OP_NO_COMPRESSION

    def test_suites_follow_the_server(self) -> None:
        server = ServerTls([site("a.test").pair])
        client = trusting(ciphers="ECDHE+CHACHA20:ECDHE+AES256+AESGCM:ECDHE+AES128+AESGCM")
        client.maximum_version = ssl.TLSVersion.TLSv1_2
        suite = handshake(server.context, client)[1].cipher()
        assert suite is not None
        assert suite[0] == "ECDHE-ECDSA-AES128-GCM-SHA256"
        names = {c["name"] for c in server.context.get_ciphers() if c["protocol"] == "TLSv1.2"}
        assert all(name.startswith("ECDHE-") and ("GCM" in name or "CHACHA" in name) for name in names)

    def test_configured_suites_are_used(self) -> None:
        server = ServerTls([site("a.test").pair], ciphers="ECDHE-ECDSA-AES256-GCM-SHA384")
        client = trusting()
        client.maximum_version = ssl.TLSVersion.TLSv1_2
        suite = handshake(server.context, client)[1].cipher()
        assert suite is not None
        assert suite[0] == "ECDHE-ECDSA-AES256-GCM-SHA384"

    @needs_openssl
    def test_alpn_is_what_is_offered_on_every_virtual_host(self) -> None:
        server = ServerTls([site("a.test").pair, site("b.test").pair], alpn=["http/1.1"])
        with serving(server.context) as (port, _):
            for name in ("a.test", "b.test"):
                said = s_client(port, "-alpn", "h2,http/1.1", "-servername", name)
                assert "ALPN protocol: http/1.1" in said
            assert "No ALPN negotiated" in s_client(port, "-alpn", "h2")

    @pytest.mark.parametrize("kind", ["server", "client"])
    def test_an_end_without_close_notify_is_not_an_end(self, kind: str) -> None:
        server, client = ServerTls([site("a.test").pair]).context, trusting()
        a, b = socket.socketpair()
        a.settimeout(30)
        b.settimeout(30)
        near = server.wrap_socket(
            a, server_side=True, do_handshake_on_connect=False, suppress_ragged_eofs=False
        )
        far = client.wrap_socket(
            b, server_hostname="a.test", do_handshake_on_connect=False, suppress_ragged_eofs=False
        )
        thread = threading.Thread(target=far.do_handshake)
        thread.start()
        near.do_handshake()
        thread.join(30)
        reader, closer = (near, far) if kind == "server" else (far, near)
        with near, far:
            socket.socket.shutdown(closer, socket.SHUT_WR)
            with pytest.raises(ssl.SSLError) as caught:
                reader.recv(10)
            assert is_ragged_eof(caught.value)


# --- client certificates ------------------------------------------------------------------------------------


@needs_openssl
class TestClientCertificates:
    @pytest.fixture
    def files(self, tmp_path: Path) -> dict[str, list[str]]:
        shown: dict[str, list[str]] = {"none": []}
        for name, issued in (("alice", alice()), ("stranger", issue("stranger", issuer=issue("Other CA")))):
            (tmp_path / f"{name}.pem").write_bytes(issued.pem)
            (tmp_path / f"{name}.key").write_bytes(issued.key_pem())
            shown[name] = ["-cert", str(tmp_path / f"{name}.pem"), "-key", str(tmp_path / f"{name}.key")]
        return shown

    @pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
    @pytest.mark.parametrize(
        ("client_auth", "shows", "accepted"),
        [
            ("none", "none", True),
            ("none", "alice", True),
            ("optional", "none", True),
            ("optional", "alice", True),
            ("optional", "stranger", False),
            ("required", "none", False),
            ("required", "alice", True),
            ("required", "stranger", False),
        ],
    )
    def test_who_may_in(
        self,
        files: dict[str, list[str]],
        client_auth: tls.ClientAuth,
        shows: str,
        accepted: bool,
        version: str,
    ) -> None:
        server = ServerTls(
            [site("a.test").pair, site("b.test").pair],
            client_auth=client_auth,
            client_ca_pem=None if client_auth == "none" else ca().pem,
        )
        with serving(server.context) as (port, seen):
            for name in ("a.test", "b.test"):  # the switched context asks as well
                said = s_client(port, version, "-servername", name, *files[shows])
                connection = seen.get(timeout=60)
                assert ("200 OK" in said) is accepted, said
                assert (connection.error is None) is accepted
                known = accepted and shows == "alice" and client_auth != "none"
                assert connection.subject == ("CN=alice\\, admin,O=Ex\\=ample" if known else None)


def test_subject_text_is_safe_in_a_header() -> None:
    assert tls._rfc4514(' a\r\n"b" é\x7f ') == '\\ a\\0D\\0A\\"b\\" \\C3\\A9\\7F\\ '
    assert tls._rfc4514("#1") == "\\#1"
    assert tls._rfc4514("a\\ ") == "a\\\\\\ "


# --- towards backends ---------------------------------------------------------------------------------------


class TestClientContext:
    def test_name_is_verified(self) -> None:
        server = three_hosts()
        handshake(server.context, trusting(), "b.test")
        with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
            handshake(server.context, trusting(), "c.test")
        handshake(server.context, trusting(), "192.0.2.1")

    def test_a_bundle_may_carry_comments(self) -> None:
        bundle = issue("Other CA").pem + "# Örtliche CA\n".encode() + ca().pem
        handshake(three_hosts().context, client_context(ca_pem=bundle), "b.test")

    def test_issuer_is_verified(self) -> None:
        server = three_hosts()
        for client in (client_context(), client_context(ca_pem=issue("Other CA").pem)):
            with pytest.raises(ssl.SSLCertVerificationError):
                handshake(server.context, client, "a.test")

    def test_unverified_still_names_the_server(self) -> None:
        near, _ = handshake(three_hosts().context, client_context(verify_peer=False), "c.test")
        assert tls.sni_of(near) == "c.test"

    def test_shows_its_certificate(self) -> None:
        server = ServerTls([site("a.test").pair], client_auth="required", client_ca_pem=ca().pem)
        near, _ = handshake(server.context, trusting(certificate=alice().pair))
        assert tls.client_subject(near) == "CN=alice\\, admin,O=Ex\\=ample"

    def test_alpn(self) -> None:
        server = ServerTls([site("a.test").pair], alpn=["http/1.1"])
        assert (
            handshake(server.context, trusting(alpn=["http/1.1"]))[1].selected_alpn_protocol() == "http/1.1"
        )

    @pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
    def test_one_session_serves_many_connections(self, version: ssl.TLSVersion) -> None:
        server, client = three_hosts(), trusting()
        client.maximum_version = version
        session = handshake(server.context, client)[1].session
        for _ in range(3):
            assert handshake(server.context, client, session=session)[1].session_reused

    def test_tls_1_1_is_refused(self) -> None:
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        old.set_ciphers("ALL:@SECLEVEL=0")
        old.load_cert_chain(*memory_files(site("a.test")))
        with pytest.warns(DeprecationWarning, match="TLSv1_1"):
            old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises(ssl.SSLError):
            handshake(old, trusting())

    @pytest.mark.parametrize(
        ("host", "verify", "expected"),
        [
            ("Backend.Test.", None, "backend.test"),
            ("[2001:db8:0::1]", None, "2001:db8::1"),
            ("10.0.0.1", "real.test", "real.test"),
        ],
    )
    def test_server_name(self, host: str, verify: str | None, expected: str) -> None:
        assert tls.backend_server_name(host, verify) == expected


# --- bad input ----------------------------------------------------------------------------------------------


def bad_server(**changes: object) -> Callable[[], object]:
    arguments: dict[str, object] = {"certificates": [site("a.test").pair]}
    return lambda: ServerTls(**{**arguments, **changes})  # type: ignore[arg-type]  # wrong on purpose


def pair(cert: bytes, key: bytes, label: str = "") -> list[CertificatePair]:
    return [site("z.test").pair, CertificatePair(cert, key, label)]


A = site("a.test")
PEM = A.pem.splitlines(keepends=True)

BAD = {
    "no certificate": (bad_server(certificates=[]), "needs at least one certificate"),
    "empty": (bad_server(certificates=pair(b"", b"")), "^certificate 2 holds no certificate in PEM form"),
    "der": (
        bad_server(certificates=pair(ssl.PEM_cert_to_DER_cert(A.pem.decode()), b"")),
        "no certificate in PEM",
    ),
    "damaged": (
        bad_server(certificates=pair(PEM[0] + b"AAAA\n" + PEM[-1], A.key_pem(), "x.pem")),
        "^x.pem cannot be read as a certificate",
    ),
    "damaged base64": (
        bad_server(certificates=pair(PEM[0] + b"!!!\n" + PEM[-1], A.key_pem(), "x.pem")),
        "^x.pem cannot be read as a certificate",
    ),
    "damaged intermediate": (
        bad_server(certificates=pair(A.pem + PEM[0] + b"AAAA\n" + PEM[-1], A.key_pem(), "x.pem")),
        "^x.pem cannot be used: .* damaged",
    ),
    "long chain": (
        bad_server(certificates=pair(A.pem * 7, A.key_pem())),
        "chain of 7 certificates, at most 6",
    ),
    "no key": (bad_server(certificates=pair(A.pem, A.pem, "x.pem")), "^the key for x.pem is not in PEM form"),
    "damaged key": (
        bad_server(
            certificates=pair(A.pem, b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")
        ),
        "^certificate 2 cannot be used: it or its key is damaged",
    ),
    "other key": (
        bad_server(certificates=pair(A.pem, site("b.test").key_pem(), "x.pem")),
        "^x.pem cannot be used: its key belongs to another certificate",
    ),
    "other key type": (
        bad_server(certificates=pair(A.pem, rsa_site("a.test").key_pem(), "x.pem")),
        "^x.pem cannot be used: its key belongs to another certificate",
    ),
    "key of its neighbour": (
        bad_server(
            certificates=[rsa_site("a.test").pair, A.pair._replace(key_pem=rsa_site("a.test").key_pem())]
        ),
        "^certificate 2 cannot be used: its key belongs to another certificate",
    ),
    "encrypted key": (
        bad_server(certificates=pair(A.pem, A.key_pem(b"secret"), "x.pem")),
        "^the key for x.pem is encrypted: store it decrypted",
    ),
    "same names": (
        bad_server(certificates=[A.pair, issue("a.test", "a.test", issuer=ca()).pair]),
        "certificate 2 and certificate 1 are for the same names with the same type of key",
    ),
    "weak key": (
        bad_server(
            certificates=[
                issue("w.test", key=rsa.generate_private_key(public_exponent=65537, key_size=1024)).pair
            ]
        ),
        "certificate 1 cannot be used: its key is too short",
    ),
    "auth without ca": (bad_server(client_auth="required"), "client_auth needs a client CA"),
    "ca without auth": (bad_server(client_ca_pem=ca().pem), "does nothing while client_auth is none"),
    "auth unknown": (bad_server(client_auth="maybe"), "none, optional or required, not 'maybe'"),
    "ca empty": (bad_server(client_auth="optional", client_ca_pem=b""), "client CA holds no certificate"),
    "ca garbage": (
        bad_server(client_auth="optional", client_ca_pem=b"\xff\x00"),
        "client CA holds no certificate",
    ),
    "version": (bad_server(min_version="1.1"), "min_version must be 1.2 or 1.3, not '1.1'"),
    "cipher typo": (bad_server(ciphers="ECDHE+AESGCM:ECDHE+TYPO"), r"'ECDHE\+TYPO' is no TLS 1.2 cipher"),
    "cipher of 1.3": (bad_server(ciphers="TLS_AES_128_GCM_SHA256"), "is no TLS 1.2 cipher"),
    "cipher empty": (bad_server(ciphers=""), "is no TLS 1.2 cipher"),
    "no cipher left": (bad_server(ciphers="ECDHE+AESGCM:!ALL"), "leaves no cipher"),
    "cipher null": (bad_server(ciphers="ALL:eNULL:@SECLEVEL=0"), "does not authenticate or does not encrypt"),
    "ciphers and 1.3": (bad_server(ciphers="ECDHE+AESGCM", tls13_only=True), "only TLS 1.3 is allowed"),
    "alpn": (bad_server(alpn=["é"]), "alpn names must be"),
    "alpn empty": (bad_server(alpn=[""]), "alpn names must be"),
    "backend ca": (lambda: client_context(ca_pem=b"x"), "the backend's CA holds no certificate"),
    "backend ca unused": (lambda: client_context(verify_peer=False, ca_pem=ca().pem), "does nothing while"),
    "backend pair": (
        lambda: client_context(certificate=CertificatePair(A.pem, ca().key_pem(), "c.pem")),
        "^c.pem cannot be used: its key belongs",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_a_sentence(case: str) -> None:
    make, sentence = BAD[case]
    with pytest.raises(TlsConfigError, match=sentence):
        make()


# --- the process --------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_loads_keys_after_privileges_are_gone() -> None:
    content = A.pair
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            ServerTls([content])
            client_context(certificate=content)
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


def test_facts_for_metrics_and_warnings() -> None:
    fact = ServerTls([A.pair._replace(label="a.pem")]).certificates[0]
    assert fact.names == ("a.test",)
    assert fact.is_ecdsa
    assert fact.label == "a.pem"
    assert fact.not_before == int(A.certificate.not_valid_before_utc.timestamp())
    assert fact.not_after == int(A.certificate.not_valid_after_utc.timestamp())
    assert not ServerTls([rsa_site("a.test").pair]).certificates[0].is_ecdsa
    assert three_hosts().certificates[0].names[3:] == ("192.0.2.1", "2001:db8::1")


def test_dropping_a_listener_frees_its_contexts_at_once() -> None:
    gc.collect()
    gc.disable()
    try:
        server = three_hosts()
        contexts = [weakref.ref(c) for c in (server.context, *server._hosts.alternatives)]
        near, far = handshake(server.context, trusting(), "b.test")
        del server, near, far
        assert [c() for c in contexts] == [None] * 3
    finally:
        gc.enable()


def test_no_descriptor_stays_open() -> None:
    before = os.listdir("/proc/self/fd")
    three_hosts()
    with pytest.raises(TlsConfigError):
        BAD["encrypted key"][0]()
    assert len(os.listdir("/proc/self/fd")) == len(before)
