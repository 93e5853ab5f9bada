"""OCSP stapling: which response goes with which certificate, as `openssl s_client` sees it, and memory."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import ssl
import weakref
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from expressgateway.net import stapling
from expressgateway.net.stapling import StaplingUnavailable, staple
from expressgateway.net.tickets import LibSsl, TicketKeySchedule
from expressgateway.net.tls import CertificatePair, ServerTls
from tests.config.material import ocsp_response
from tests.e2e.http_world import rss_bytes
from tests.net.tls_peers import (
    Issued,
    ca,
    handshake,
    needs_openssl,
    rsa_site,
    s_client,
    serving,
    site,
    trusting,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

_SET_STATUS_TYPE = 65  # SSL_CTX_set_tlsext_status_type(3), by SSL_CTX_ctrl


def response_for(issued: Issued) -> bytes:
    return ocsp_response(issued.pem, ca().key, issuer=ca().pem)


def stapled(issued: Issued) -> CertificatePair:
    return issued.pair._replace(ocsp=response_for(issued))


def serial_of(issued: Issued) -> str:
    return f"{issued.certificate.serial_number:X}"


def asked(port: int, *options: str) -> tuple[str, str]:
    """The serial numbers of the certificate that is shown and of the one the response is about; empty: no
    response."""
    output = s_client(port, "-status", *options)
    assert "CONNECTED" in output
    if "OCSP response: no response sent" in output:
        return "", ""
    assert "OCSP Response Status: successful" in output, output
    assert "Cert Status: good" in output
    found = re.search(r"Serial Number: ([0-9A-F]+)", output)
    assert found is not None
    return found[1].lstrip("0"), output


@pytest.fixture
def wanting() -> ssl.SSLContext:
    """A client that asks for the response. Python has no word for it."""
    context = trusting()
    lib = LibSsl.open()
    assert lib.ctrl(lib.pointer_of(context), _SET_STATUS_TYPE, 1, None) == 1
    return context


@needs_openssl
@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
class TestOnTheWire:
    def test_the_response_is_given(self, version: str) -> None:
        server = ServerTls([stapled(site("a.test"))])
        assert server.unstapled == ""
        with serving(server.context) as (port, _):
            assert asked(port, version)[0] == serial_of(site("a.test"))

    def test_only_to_who_asks(self, version: str) -> None:
        server = ServerTls([stapled(site("a.test"))])
        with serving(server.context) as (port, _):
            assert "OCSP" not in s_client(port, version)

    def test_names_have_their_own(self, version: str) -> None:
        server = ServerTls([stapled(site("a.test")), stapled(site("b.test")), site("c.test").pair])
        with serving(server.context) as (port, _):
            for name, expected in (
                ("a.test", serial_of(site("a.test"))),
                ("b.test", serial_of(site("b.test"))),
                ("c.test", ""),
                ("unknown.test", serial_of(site("a.test"))),
            ):
                assert asked(port, version, "-servername", name)[0] == expected, name

    def test_only_another_name_has_one(self, version: str) -> None:
        server = ServerTls([site("a.test").pair, stapled(site("b.test"))])
        with serving(server.context) as (port, _):
            assert asked(port, version, "-servername", "a.test")[0] == ""
            assert asked(port, version, "-servername", "b.test")[0] == serial_of(site("b.test"))

    def test_two_kinds_of_key_have_their_own(self, version: str) -> None:
        server = ServerTls([stapled(site("a.test")), stapled(rsa_site("a.test"))])
        with serving(server.context) as (port, _):
            for algorithm, issued in (("ECDSA", site("a.test")), ("RSA-PSS", rsa_site("a.test"))):
                sigalgs = f"{algorithm}+SHA256"
                assert asked(port, version, "-sigalgs", sigalgs)[0] == serial_of(issued), algorithm

    def test_one_of_two_kinds_has_none(self, version: str) -> None:
        server = ServerTls([site("a.test").pair, stapled(rsa_site("a.test"))])
        with serving(server.context) as (port, _):
            assert asked(port, version, "-sigalgs", "ECDSA+SHA256")[0] == ""
            assert asked(port, version, "-sigalgs", "RSA-PSS+SHA256")[0] == serial_of(rsa_site("a.test"))

    def test_with_tickets_on_the_same_context(self, version: str) -> None:
        server = ServerTls([stapled(site("a.test"))])
        server.install_tickets(TicketKeySchedule(10, 10).keys_at(0))
        with serving(server.context) as (port, _):
            assert asked(port, version)[0] == serial_of(site("a.test"))


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_session_is_resumed_by_who_asks(wanting: ssl.SSLContext, version: ssl.TLSVersion) -> None:
    """No certificate is shown then, and no response."""
    wanting.maximum_version = version
    server = ServerTls([stapled(site("a.test")), stapled(site("b.test"))])
    server.install_tickets(TicketKeySchedule(10, 10).keys_at(0))
    for name in ("a.test", "b.test"):
        session = handshake(server.context, wanting, name)[1].session
        assert handshake(server.context, wanting, name, session)[1].session_reused


class TestMemory:
    def test_no_handshake_leaves_anything(self, wanting: ssl.SSLContext) -> None:
        """A response is copied into OpenSSL's memory for each handshake: 12 MB, were they kept."""
        issued = site("a.test")
        server = ServerTls([issued.pair._replace(ocsp=bytes(60_000))])

        def serve(number: int) -> int:
            for _ in range(number):
                handshake(server.context, wanting)
            gc.collect()
            return rss_bytes(os.getpid())

        before = serve(50)
        assert serve(200) - before < 5_000_000

    def test_a_context_that_a_reload_drops_in_the_middle(self, wanting: ssl.SSLContext) -> None:
        for _ in range(5):
            server = [ServerTls([stapled(site("b.test")), stapled(site("a.test"))])]

            def drop(server: list[ServerTls] = server) -> None:
                server.clear()
                gc.collect()

            handshake(server[0].context, wanting, between=drop)

    def test_contexts_go_with_their_callbacks(self) -> None:
        def made() -> Iterator[weakref.ref[object]]:
            server = ServerTls([stapled(site("a.test")), stapled(site("b.test"))])
            yield weakref.ref(server.context)
            yield weakref.ref(vars(server.context)["_ocsp_staples"].callback)

        gc.collect()
        gc.disable()
        try:
            assert [found() for found in list(made())] == [None, None]
        finally:
            gc.enable()


class TestUnavailable:
    """Whatever does not fit: handshakes go on, without the response."""

    @pytest.fixture(autouse=True)
    def afresh(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(stapling._Functions, "_opened", None)

    def serves(self, wanting: ssl.SSLContext, reason: str) -> None:
        server = ServerTls([stapled(site("a.test"))])
        assert reason in server.unstapled
        assert "_ocsp_staples" not in vars(server.context)
        handshake(server.context, wanting)

    def test_openssl_is_newer_than_what_was_tried(
        self, wanting: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(ssl, "OPENSSL_VERSION_INFO", (3, 6, 0, 0, 0))
        self.serves(wanting, "was not tried")

    def test_contexts_are_laid_out_in_another_way(
        self, wanting: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(LibSsl, "agrees", lambda *_: False)
        self.serves(wanting, "does not read as Python describes it")

    def test_the_callback_is_refused(self, wanting: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(stapling._Functions.open(), "set_callback", lambda *_: 0)
        self.serves(wanting, "refused the callback")

    def test_a_function_is_missing(self, wanting: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch) -> None:
        class Nothing:
            def __init__(self, *_: object) -> None: ...

        LibSsl.open()
        monkeypatch.setattr(ctypes, "PyDLL", Nothing)
        self.serves(wanting, "cannot be called from outside")

    def test_memory_is_short(self, wanting: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(stapling._Functions.open(), "malloc", lambda *_: None)
        handshake(ServerTls([stapled(site("a.test"))]).context, wanting)

    def test_a_callback_that_fails(self, wanting: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object) -> int:
            raise RuntimeError("made for the test")

        monkeypatch.setattr(stapling._Functions.open(), "chosen", fail)
        handshake(ServerTls([stapled(site("a.test"))]).context, wanting)

    def test_the_certificate_in_the_context_is_another(self) -> None:
        context = ServerTls([site("a.test").pair]).context
        other = site("b.test").certificate.public_bytes(Encoding.DER)
        with pytest.raises(StaplingUnavailable, match="is not the one that was loaded"):
            staple(context, other, b"response")
        with pytest.raises(StaplingUnavailable, match="is not the one that was loaded"):
            staple(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), other, b"response")
