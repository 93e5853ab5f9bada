"""What both ends agree on, and whom our client trusts."""

import ipaddress
from typing import Any

import aioquic.tls
import pytest
from cryptography import x509

from expressgateway.demo.certificate import CertificatePem, make_certificate
from expressgateway.net.quic.dial import QuicDialler
from expressgateway.net.quic.events import Ended
from expressgateway.net.quic.tls import (
    NO_APPLICATION_PROTOCOL,
    Grants,
    TicketStore,
    TlsSettings,
    client_tls,
    read_sni,
    server_tls,
)
from expressgateway.net.quic.verify import BAD_CERTIFICATE, Trust
from expressgateway.upstream.errors import Fault
from tests.net.quic.world import (
    ALPN,
    AioClient,
    AioServer,
    Authority,
    Link,
    OurClient,
    OurServer,
    authority,
    both_open,
    certificate,
)


class TestAlpn:
    def test_none_in_common_for_our_server(self) -> None:
        client = AioClient(alpn_protocols=["something else"])
        server = OurServer()
        link = Link(client, server)
        link.run(lambda: client.ended, 5)
        assert client.ended is not None
        assert client.ended.error_code == 0x178 == NO_APPLICATION_PROTOCOL
        assert not server.ear.is_open

    def test_none_at_all(self) -> None:
        client = AioClient(alpn_protocols=None)
        server = OurServer()
        link = Link(client, server)
        link.run(lambda: client.ended, 5)
        assert client.ended is not None
        assert client.ended.error_code == 0x178

    def test_a_backend_that_speaks_something_else(self) -> None:
        client = OurClient()
        link = Link(client, AioServer(alpn_protocols=["other"]))
        link.run(lambda: client.ear.ended, 5)
        assert client.ear.ended is not None
        assert not client.ear.is_open
        assert QuicDialler.explain(client.ear.ended).fault in (Fault.PROTOCOL, Fault.TLS)

    def test_a_backend_that_picks_none(self) -> None:
        client = OurClient()
        link = Link(client, AioServer(alpn_protocols=None))
        link.run(lambda: client.ear.ended or client.ear.is_open, 5)
        assert not client.ear.is_open
        assert client.ear.ended is not None
        assert client.ear.ended.code == 0x178

    def test_what_both_speak(self) -> None:
        client = AioClient(alpn_protocols=["other", ALPN])
        server = OurServer()
        both_open(Link(client, server))
        assert client.alpn == server.engine.alpn == ALPN


class TestNames:
    def test_the_servers_name(self) -> None:
        server = OurServer()
        both_open(Link(AioClient(server_name="www.example.org"), server))
        assert server.engine.sni == "www.example.org"

    def test_none(self) -> None:
        server = OurServer()
        both_open(Link(AioClient(server_name=None), server))
        assert server.engine.sni is None

    @pytest.mark.parametrize("data", [b"", b"\x01\x00", b"\x01\x00\x00\x05"])
    def test_a_hello_of_which_more_is_to_come(self, data: bytes) -> None:
        assert read_sni(data) == (None, True)

    def test_a_hello_that_cannot_be_read(self) -> None:
        assert read_sni(b"\x01\x00\x00\x05abcde") == (None, False)


def trusting(ca: bytes | None, name: str = "localhost", *, verify: bool = True) -> TlsSettings:
    return client_tls([ALPN], Grants(), server_name=name, ca=ca, verify=verify)


def meet(settings: TlsSettings, chain: CertificatePem) -> Ended | None:
    """Whether our client accepts that server: ``None``, or why not."""
    client = OurClient(settings=settings)
    server = AioServer(chain=chain)
    link = Link(client, server)
    link.run(lambda: client.ear.is_open or client.ear.ended, 5)
    if client.ear.ended is not None:
        assert not client.ear.is_open
        link.run(lambda: server.ended, 5)
        assert server.ended is not None
        assert not server.is_open, "the server thinks that it was accepted"
    return client.ear.ended


def dns(name: str) -> x509.DNSName:
    return x509.DNSName(name)


class TestTrust:
    def test_signed_by_an_authority(self) -> None:
        assert meet(trusting(authority().pem), authority().issue(dns("localhost"))) is None

    def test_with_an_intermediate_authority_that_is_not_shown(self) -> None:
        other = Authority("Another")
        assert meet(trusting(authority().pem), other.issue(dns("localhost"))) is not None

    def test_one_of_several_authorities(self) -> None:
        both = Authority("Another").pem + authority().pem
        assert meet(trusting(both), authority().issue(dns("localhost"))) is None

    def test_an_authority_of_the_same_name_with_another_key(self) -> None:
        assert meet(trusting(authority().pem), Authority().issue(dns("localhost"))) is not None

    def test_pinned(self) -> None:
        own = make_certificate()
        assert meet(trusting(own.certificate), own) is None

    def test_pinned_beside_an_authority(self) -> None:
        own = make_certificate()
        assert meet(trusting(authority().pem + own.certificate), own) is None

    def test_another_self_signed_one(self) -> None:
        assert meet(trusting(make_certificate().certificate), make_certificate()) is not None

    def test_no_authority_of_the_system(self) -> None:
        assert meet(trusting(None), make_certificate()) is not None

    @pytest.mark.parametrize("is_pinned", [True, False])
    def test_another_name(self, is_pinned: bool) -> None:
        chain = (
            make_certificate("a.example", local=False) if is_pinned else authority().issue(dns("a.example"))
        )
        ca = chain.certificate if is_pinned else authority().pem
        ended = meet(trusting(ca, "b.example"), chain)
        assert ended is not None
        assert QuicDialler.explain(ended).fault is Fault.CERTIFICATE
        assert meet(trusting(ca, "a.example"), chain) is None

    @pytest.mark.parametrize("is_pinned", [True, False])
    def test_expired(self, is_pinned: bool) -> None:
        chain = make_certificate(days=-1) if is_pinned else authority().issue(dns("localhost"), days=-1)
        ended = meet(trusting(chain.certificate if is_pinned else authority().pem), chain)
        assert ended is not None
        assert QuicDialler.explain(ended).fault is Fault.CERTIFICATE

    @pytest.mark.parametrize("is_pinned", [True, False])
    @pytest.mark.parametrize("name", ["10.1.2.3", "2001:db8::1"])
    def test_addresses(self, is_pinned: bool, name: str) -> None:
        address = x509.IPAddress(ipaddress.ip_address(name))
        chain = make_certificate(name, local=False) if is_pinned else authority().issue(address)
        ca = chain.certificate if is_pinned else authority().pem
        assert meet(trusting(ca, name), chain) is None
        assert meet(trusting(ca, "10.1.2.4"), chain) is not None

    @pytest.mark.parametrize("is_pinned", [True, False])
    def test_wildcards_stand_for_one_label(self, is_pinned: bool) -> None:
        chain = (
            make_certificate("*.example.org", local=False)
            if is_pinned
            else authority().issue(dns("*.example.org"))
        )
        ca = chain.certificate if is_pinned else authority().pem
        assert meet(trusting(ca, "a.example.org"), chain) is None
        assert meet(trusting(ca, "A.Example.ORG"), chain) is None
        assert meet(trusting(ca, "example.org"), chain) is not None
        assert meet(trusting(ca, "a.b.example.org"), chain) is not None

    def test_a_certificate_that_names_nobody(self) -> None:
        assert meet(trusting(authority().pem), authority().issue()) is not None

    def test_unverified(self) -> None:
        assert meet(trusting(None, verify=False), make_certificate("x.example", local=False)) is None

    def test_nothing_of_an_untrusted_server_reaches_the_session(self) -> None:
        client = OurClient(settings=trusting(authority().pem))
        server = AioServer(chain=make_certificate())
        link = Link(client, server)
        link.run(seconds=1)
        assert client.ear.ended is not None
        assert client.ear.ended.code == BAD_CERTIFICATE
        assert (client.ear.data, client.ear.is_open, client.ear.endings) == ({}, False, 1)

    def test_what_cannot_be_read(self) -> None:
        with pytest.raises(ValueError, match="PEM"):
            Trust(b"no PEM", "localhost")
        with pytest.raises(ValueError, match="QUIC"):
            server_tls(b"no PEM", b"neither", [ALPN], Grants(), TicketStore())
        with pytest.raises(ValueError, match="QUIC"):
            client_tls([ALPN], Grants(), server_name="x", ca=None, chain=b"no", key=b"pem")


class TestClientCertificates:
    @pytest.fixture(autouse=True)
    def _servers_that_ask(self, monkeypatch: pytest.MonkeyPatch) -> None:
        create = aioquic.tls.Context.__init__

        def asking(context: Any, *arguments: Any, **options: Any) -> None:
            create(context, *arguments, **options)
            context._request_client_certificate = not options["is_client"]

        monkeypatch.setattr(aioquic.tls.Context, "__init__", asking)

    def test_a_server_that_asks_is_shown_ours(self) -> None:
        own = authority().issue(dns("gateway"))
        settings = client_tls(
            [ALPN],
            Grants(),
            server_name="localhost",
            ca=certificate().certificate,
            chain=own.certificate,
            key=own.key,
        )
        server = AioServer()
        both_open(Link(OurClient(settings=settings), server))
        shown = server.quic.tls._peer_certificate
        assert shown == x509.load_pem_x509_certificate(own.certificate)

    def test_and_learns_that_there_is_none(self) -> None:
        server = AioServer()
        both_open(Link(OurClient(), server))
        assert server.quic.tls._peer_certificate is None
