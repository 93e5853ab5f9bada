"""How a listener is secured: certificates and clients' certificates over TCP, and the QUIC transport.

Only names of files stand here; reading them is `material`'s work.
"""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from expressgateway.config.values import LIST, Address, Block, Fault, FilePath, Matches, Range, shown

_ALPN = Annotated[str, Matches("an ALPN name of 1 to 255 characters", r"[!-~]{1,255}")]


MAX_TICKET_KEYS = 62
"""Session ticket keys that are kept beside the newest one, at most."""


class Certificate(Block):
    """One certificate chain and its private key."""

    cert_path: FilePath = Field(
        description="Certificate chain (PEM), the server's own first, at most 6 in all."
    )
    key_path: FilePath = Field(description="Private key (PEM), readable by its owner only.")
    ocsp_path: FilePath | None = Field(
        default=None,
        description="OCSP response (DER) for the certificate, stapled to handshakes over TCP; kept fresh by "
        "your tooling. One that cannot be used is not stapled.",
    )


class ListenerTls(Block):
    """TLS towards clients."""

    cert_path: FilePath = Field(
        description="Certificate chain (PEM), the server's own first, at most 6 in all. Shown to "
        "clients whose SNI matches no other."
    )
    key_path: FilePath = Field(description="Private key (PEM) of `cert_path`, readable by its owner only.")
    ocsp_path: FilePath | None = Field(
        default=None,
        description="OCSP response (DER) for the certificate, stapled to handshakes over TCP; kept fresh by "
        "your tooling. One that cannot be used is not stapled.",
    )
    certificates: Annotated[tuple[Certificate, ...], LIST] = Field(
        default=(),
        description="Further certificates as `{cert_path, key_path, ocsp_path}`, chosen by the names in them "
        "and the client's SNI.",
    )
    client_auth: Literal["none", "optional", "required"] = Field(
        default="none", description="Whether clients are asked for a certificate."
    )
    client_ca_path: FilePath | None = Field(
        default=None,
        description="CA bundle (PEM) that signs the clients' certificates; needed to ask for them.",
    )
    ticket_rotation_interval_seconds: Annotated[int, Range(1, unit="seconds")] = Field(
        default=86400, description="Age at which the session ticket key is replaced, in all workers at once."
    )
    ticket_rotation_overlap_seconds: Annotated[int, Range(1, unit="seconds")] = Field(
        default=86400, description="Time for which tickets under a replaced key are still accepted."
    )

    def faults(self) -> Iterator[Fault]:
        if self.client_auth != "none" and self.client_ca_path is None:
            yield Fault(
                ("client_auth",),
                f'client_auth = "{self.client_auth}" needs client_ca_path',
                "name the CA bundle that signs the clients' certificates",
                depends=(("client_ca_path",),),
            )
        longest_s = MAX_TICKET_KEYS * self.ticket_rotation_interval_seconds
        if self.ticket_rotation_overlap_seconds > longest_s:
            yield Fault(
                ("ticket_rotation_overlap_seconds",),
                f"an overlap of more than {MAX_TICKET_KEYS} rotations would keep too many keys",
                f"expected at most {longest_s} seconds, or a longer ticket_rotation_interval_seconds",
                depends=(("ticket_rotation_interval_seconds",),),
            )
        if self.client_auth == "none" and self.client_ca_path is not None:
            yield Fault(
                ("client_ca_path",),
                'client_ca_path has no effect with client_auth = "none"',
                'set client_auth to "optional" or "required", or remove the key',
                depends=(("client_auth",),),
            )

    @property
    def every(self) -> "tuple[ListenerTls | Certificate, ...]":
        """What names a certificate here, the default one first."""
        return (self, *self.certificates)


class RawProxy(Block):
    """Mode B: the client's QUIC connection ends here and another begins, streams mapped one to one."""

    backend_addr: Address | None = Field(
        default=None,
        description="The backend; instead of it `backends`.",
        json_schema_extra={"default_text": "required"},
    )
    backends: Annotated[tuple[Address, ...], LIST] = Field(
        default=(), description="Backends to be balanced over, instead of `backend_addr`."
    )
    sni: Annotated[str, Matches("a host name", r"[0-9A-Za-z._-]{1,253}")] = Field(
        description="Name sent to the backend and looked for in its certificate."
    )
    backend_ca_path: FilePath | None = Field(
        default=None,
        description="CA bundle (PEM); without it the system's roots. The backend is always verified.",
    )
    dgram_queue_cap: Annotated[int, Range(1, 1_000_000)] = Field(
        default=1024, description="Datagrams waiting in each direction; further ones are dropped and counted."
    )
    max_relay_streams: Annotated[int, Range(1, 1_000_000)] = Field(
        default=256, description="Streams relayed at once; beyond it credit is withheld."
    )
    alpn: Annotated[tuple[_ALPN, ...], LIST] = Field(
        default=("h3",), min_length=1, description="Application protocols offered on both sides."
    )

    def faults(self) -> Iterator[Fault]:
        if self.backend_addr is None and not self.backends:
            yield Fault(
                ("backend_addr",),
                "raw_proxy needs a backend",
                "add backend_addr, or backends",
                depends=(("backends",),),
            )
        if self.backend_addr is not None and self.backends:
            yield Fault(("backends",), "backend_addr and backends exclude each other", "keep one of them")
        for index, address in enumerate(self.backends):
            if address in self.backends[:index]:
                yield Fault(
                    ("backends", index), f"{shown(str(address))} stands here twice", "remove one of the two"
                )


class Quic(Block):
    """The QUIC transport of a listener."""

    cert_path: FilePath = Field(description="Certificate chain (PEM), at most 6 in all.")
    key_path: FilePath = Field(description="Private key (PEM), readable by its owner only.")
    retry_secret_path: FilePath = Field(
        description="32 bytes that sign Retry tokens; created with mode 0600 if absent, refused if "
        "others can read it."
    )
    max_idle_timeout_ms: Annotated[int, Range(1, unit="milliseconds")] = Field(
        default=30_000, description="Silence after which a connection is closed."
    )
    max_recv_udp_payload_size: Annotated[int, Range(1200, 65527, "bytes")] = Field(
        default=1350, description="Largest datagram accepted."
    )
    retry: Literal["always", "adaptive", "never"] = Field(
        default="adaptive",
        description="When a new client must prove its address. `adaptive`: above a rate of half-open "
        "handshakes.",
    )
    raw_proxy: RawProxy | None = Field(default=None, description="Mode B; absent = HTTP/3.")
