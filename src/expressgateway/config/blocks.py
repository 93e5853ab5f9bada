"""The blocks that concern the whole process: runtime, observability, admin, security, passthrough."""

import os
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Final, Literal
from urllib.parse import urlsplit

from pydantic import Field, PlainValidator, ValidationInfo, WithJsonSchema, model_validator

from expressgateway.config.ciphers import parse_ciphers
from expressgateway.config.listeners import DRAIN_JITTER, DRAIN_TIMEOUT, jitter_faults
from expressgateway.config.pools import Backend, set_faults
from expressgateway.config.values import (
    LIST,
    Address,
    BadValueError,
    Block,
    Custom,
    Fault,
    FilePath,
    Fraction,
    Matches,
    Name,
    Network,
    Range,
    parse_path,
    shown,
)
from expressgateway.config.xdp import (
    Forwarding,
    Interfaces,
    SourcePorts,
    address_faults,
    denied_faults,
    vip_faults,
)

MAX_WORKERS = 256
MAX_HEADER_DEADLINE_MS = 60_000


def _parse_workers(value: object) -> int | str:
    if value == "auto" or (
        isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_WORKERS
    ):
        return value
    raise BadValueError(f'expected "auto" or a whole number from 1 to {MAX_WORKERS}, found {shown(value)}')


class RuntimeTls(Block):
    """TLS settings of every listener."""

    tls13_only: bool = Field(
        default=False, description='Accept TLS 1.3 only; the same as `min_version = "1.3"`.'
    )
    min_version: Literal["1.2", "1.3"] = Field(default="1.2", description="Oldest TLS version accepted.")
    ciphers: Annotated[str, Custom("OpenSSL cipher list", parse_ciphers)] | None = Field(
        default=None,
        description="Ciphers of TLS 1.2, in OpenSSL's notation. By default ECDHE with AES-GCM (128 bits "
        "first) or ChaCha20.",
        json_schema_extra={"default_text": "ECDHE with AEAD"},
    )

    def resolve(self) -> None:
        if self.tls13_only and not self.is_set("min_version"):
            self.settle(min_version="1.3")
        elif self.min_version == "1.3" and not self.is_set("tls13_only"):
            self.settle(tls13_only=True)

    def faults(self) -> Iterator[Fault]:
        if self.tls13_only != (self.min_version == "1.3"):
            yield Fault(
                ("min_version",),
                f"min_version = {shown(self.min_version)} contradicts tls13_only = {shown(self.tls13_only)}",
                "remove one of the two",
                depends=(("tls13_only",),),
            )
        elif self.tls13_only and self.ciphers is not None:
            yield Fault(
                ("ciphers",),
                "ciphers has no effect when only TLS 1.3 is accepted",
                "the ciphers of TLS 1.3 are fixed: remove the key",
                depends=(("tls13_only",), ("min_version",)),
            )


class Watchdog(Block):
    """The sweep that closes connections which do not get on."""

    header_deadline_ms: Annotated[int, Range(100, MAX_HEADER_DEADLINE_MS, "milliseconds")] = Field(
        default=5000,
        description="From the first byte of a request head to its end, on every listener. A listener's "
        "`header_timeout_ms` holds if it is smaller.",
    )
    body_progress_min_bps: Annotated[int, Range(0, 10_000_000, "bytes per second")] = Field(
        default=64,
        description="Slowest upload tolerated, in bytes per second; judged over five times "
        "`sweep_interval_ms`. 0 = off.",
    )
    sweep_interval_ms: Annotated[int, Range(100, 60_000, "milliseconds")] = Field(
        default=1000, description="Interval of the sweep; timeouts are looked for four times in each."
    )


class Runtime(Block):
    """Settings of the whole process."""

    workers: Annotated[
        int | Literal["auto"],
        Custom(
            f"`auto` or 1..{MAX_WORKERS}",
            _parse_workers,
            (("anyOf", [{"const": "auto"}, {"type": "integer", "minimum": 1, "maximum": MAX_WORKERS}]),),
        ),
    ] = Field(
        default="auto", description="Worker processes; `auto` is one for each core the process may use."
    )
    worker_memory_limit_bytes: Annotated[int, Range(64 * 1024 * 1024, unit="bytes", zero="off")] = Field(
        default=0,
        description="Resident memory of a worker. One that is over it is replaced by another one and drains: "
        "nothing is dropped. Not a limit of the kernel's, which would kill it.",
    )
    xdp_enabled: bool = Field(
        default=False,
        description="Attach the program that forwards the packets of listeners with `xdp`. False: they are "
        "served in user space.",
    )
    xdp_interface: Interfaces | None = Field(
        default=None,
        description="Network interfaces the program is attached to: those that packets of clients, and "
        "answers of `nat` backends, come in by. Required when enabled.",
    )
    xdp_mode: Literal["auto", "native", "skb", "hw"] = Field(
        default="auto",
        description="How it is attached: by the interface's driver (`native`), by the kernel in front of its "
        "stack (`skb`), on the card (`hw`). `auto` is `native`, or `skb` where the driver cannot.",
    )
    xdp_new_flow_cap_per_sec_per_cpu: Annotated[int, Range(1000, 10_000_000, zero="off")] = Field(
        default=125_000,
        description="New flows a second on each CPU that are remembered. Above it `dsr` forwards by Maglev's "
        "table alone, and `nat` leaves new flows to user space.",
    )
    xdp_max_flows: Annotated[int, Range(1024, 4_000_000)] = Field(
        default=65_536,
        description="Flows remembered at once, of each address family. When there are more, those that have "
        "been silent longest are forgotten.",
    )
    xdp_source_ports: SourcePorts = Field(
        default="10000-32767",
        description="Ports that `nat` flows come from, for each backend. Keep them out of "
        "`net.ipv4.ip_local_port_range`.",
    )
    xdp_tcp_idle_timeout_seconds: Annotated[int, Range(1, 604_800, "seconds")] = Field(
        default=3600, description="Silence after which a TCP flow is forgotten."
    )
    xdp_udp_idle_timeout_seconds: Annotated[int, Range(1, 86_400, "seconds")] = Field(
        default=60, description="Silence after which a UDP flow is forgotten."
    )
    xdp_closing_timeout_seconds: Annotated[int, Range(1, 600, "seconds")] = Field(
        default=10,
        description="Time after which a TCP flow is forgotten that has ended (FIN from both sides, RST), or "
        "whose first packet nobody answers.",
    )
    xdp_denied: Annotated[tuple[Network, ...], LIST] = Field(
        default=(),
        description="Networks (CIDR) whose packets to listeners with `xdp` are dropped.",
    )
    xdp_pin_path: FilePath = Field(
        default=Path("/sys/fs/bpf/expressgateway"),
        description="Directory on a BPF file system where the program and what it knows of flows stay when "
        "the gateway is replaced, or dies. Each gateway of a machine needs its own.",
    )
    drain_timeout_ms: Annotated[int, DRAIN_TIMEOUT] = Field(
        default=10_000, description="Time connections have to finish when the process stops."
    )
    readiness_settle_ms: Annotated[int, Range(0, 30_000, "milliseconds")] = Field(
        default=11_000, description="Time between turning unready and no longer accepting."
    )
    drain_jitter_ms: Annotated[int, DRAIN_JITTER] = Field(
        default=0,
        description="Time over which clients are told to leave.",
        json_schema_extra={"default_text": "drain timeout / 4", "range_text": "0..drain timeout"},
    )
    handshake_timeout_ms: Annotated[int, Range(100, 60_000, "milliseconds")] = Field(
        default=5000, description="Time for a TLS handshake."
    )
    max_inflight_connections: Annotated[int, Range(100, 2_000_000)] = Field(
        default=65_536, description="TCP connections and UDP flows at once, in all workers together."
    )
    connect_timeout_ms: Annotated[int, Range(100, 60_000, "milliseconds")] = Field(
        default=5000, description="Time to reach a backend."
    )
    per_ip_connection_cap: Annotated[int, Range(1, 2_000_000)] = Field(
        default=1024,
        description="TCP connections and UDP flows at once from one IPv4 address or IPv6 /64 network; "
        "`trusted_proxies` are exempt.",
    )
    header_underscore_policy: Literal["reject", "drop", "allow"] = Field(
        default="reject", description="What becomes of header names with an underscore."
    )
    max_keepalive_requests: Annotated[int, Range(1, 10_000_000, zero="off")] = Field(
        default=100, description="Exchanges of one client connection, on HTTP/1.1 and HTTP/2."
    )
    max_requests_per_h3_connection: Annotated[int, Range(1, 10_000_000, zero="off")] = Field(
        default=1000, description="Exchanges of one HTTP/3 connection."
    )
    trusted_proxies: Annotated[tuple[Network, ...], LIST] = Field(
        default=(), description="Networks (CIDR) whose forwarding and PROXY headers are believed."
    )
    user: Name | None = Field(default=None, description="User the process becomes after binding.")
    group: Name | None = Field(
        default=None,
        description="Group the process becomes after binding.",
        json_schema_extra={"default_text": "the user's"},
    )
    tls: RuntimeTls = Field(default_factory=RuntimeTls, description="TLS settings of every listener.")
    watchdog: Watchdog = Field(
        default_factory=Watchdog, description="The sweep that closes what does not get on."
    )

    @property
    def worker_count(self) -> int:
        """`workers` as a number on this machine."""
        if self.workers == "auto":
            return min(len(os.sched_getaffinity(0)), MAX_WORKERS)
        return self.workers

    def resolve(self) -> None:
        if not self.is_set("drain_jitter_ms"):
            self.settle(drain_jitter_ms=self.drain_timeout_ms // 4)

    def faults(self) -> Iterator[Fault]:
        yield from jitter_faults(self.drain_jitter_ms, self.drain_timeout_ms)
        if self.xdp_enabled and self.xdp_interface is None:
            yield Fault(
                ("xdp_enabled",),
                "xdp_enabled needs xdp_interface",
                "name the network interface that clients come in by",
                depends=(("xdp_interface",),),
            )
        yield from denied_faults(self.xdp_denied)


def _parse_log_path(value: object, info: ValidationInfo) -> str:
    return "stdout" if value == "stdout" else str(parse_path(value, info))


class AccessLog(Block):
    """One line for each exchange."""

    path: Annotated[str, PlainValidator(_parse_log_path), WithJsonSchema({"type": "string"})] = Field(
        default="stdout",
        description="File the lines are appended to, or `stdout`.",
        json_schema_extra={"range_text": "path, or `stdout`"},
    )
    format: Literal["json", "combined"] = Field(default="json", description="Form of a line.")
    sample: Annotated[float, Fraction()] = Field(
        default=1.0, description="Share of exchanges that are logged."
    )


_OTLP: Final = "opentelemetry.exporter.otlp.proto.http"


def _is_there(module: str) -> bool:
    """Whether it is installed; it is not imported, for that takes long."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of a package above it
        return False


class Tracing(Block):
    """Spans sent to a collector."""

    endpoint: Annotated[str, Matches('a URL such as "http://127.0.0.1:4318"', r"https?://[!-~]+")] = Field(
        description="OTLP endpoint of the collector."
    )
    service_name: Name = Field(default="expressgateway", description="Name of this service in traces.")
    sample: Annotated[float, Fraction()] = Field(
        default=0.01, description="Share of exchanges traced that came without a decision."
    )

    def faults(self) -> Iterator[Fault]:
        if not _is_there(_OTLP):
            yield Fault(
                ("endpoint",),
                "tracing needs OpenTelemetry's libraries, which are not installed",
                "pip install 'expressgateway[otlp]'",
            )
        try:
            url = urlsplit(self.endpoint)
            is_odd = not url.hostname or url.port == 0 or bool(url.query or url.fragment)
        except ValueError:
            is_odd = True
        else:
            if url.username is not None:
                yield Fault(
                    ("endpoint",),
                    "endpoint holds a name or a password, which would be shown with the configuration",
                    "set OTEL_EXPORTER_OTLP_HEADERS in the environment of the gateway instead",
                )
        if is_odd:
            yield Fault(("endpoint",), "endpoint is no URL of a collector", 'write "http://127.0.0.1:4318"')


class Observability(Block):
    """What can be seen from outside."""

    metrics_bind: Address | None = Field(
        default=None,
        description="Address of the admin listener: probes, metrics, API. Absent = none; failing to "
        "bind it is fatal.",
    )
    max_label_cardinality: Annotated[int, Range(1, 10_000_000)] = Field(
        default=10_000,
        description="Largest number of series one metric may have; checked when the file is loaded. "
        "A backend that is a DNS name counts once, however many addresses it has.",
    )
    access_log: AccessLog | None = Field(default=None, description="Access log; absent = none.")
    tracing: Tracing | None = Field(default=None, description="Traces; absent = continued but not exported.")


class Admin(Block):
    """Who may use the admin listener."""

    api_token_hash: (
        Annotated[
            str,
            Matches(
                "the SHA-256 of the token, 64 hexadecimal digits",
                r"[0-9a-f]{64}",
                "`expressgateway hash-token` prints it",
                lower=True,
            ),
        ]
        | None
    ) = Field(default=None, description="SHA-256 of the bearer token, 64 hexadecimal digits.")
    allow_non_loopback: bool = Field(
        default=False,
        description="Allow `metrics_bind` on an address that other machines can reach; needs "
        "`api_token_hash`.",
    )

    def faults(self) -> Iterator[Fault]:
        if self.allow_non_loopback and self.api_token_hash is None:
            yield Fault(
                ("allow_non_loopback",),
                "allow_non_loopback needs api_token_hash",
                "choose a token and add the output of `expressgateway hash-token`",
                depends=(("api_token_hash",),),
            )


class Security(Block):
    """Strictness beyond the standards."""

    strict_te: bool = Field(
        default=False, description="Refuse every Transfer-Encoding other than exactly `chunked`."
    )


class CidRouting(Block):
    """QUIC-LB: the backend's server id is carried in the connection ID."""

    config_id: Annotated[int, Range(0, 6)] = Field(
        description="Configuration id, in the CID's first three bits."
    )
    server_id_length: Annotated[int, Range(1, 15, "bytes")] = Field(
        description="Length of the server ids. Each backend's `id` is its server id, in hexadecimal digits."
    )
    key: Annotated[str, Matches("32 hexadecimal digits", r"[0-9a-f]{32}", lower=True)] | None = Field(
        default=None, description="AES-128 key; absent = server ids in the clear."
    )


class Passthrough(Block):
    """Mode A: QUIC routed by connection ID, never decrypted."""

    bind_addr: Address = Field(description="Bind address.")
    backends: Annotated[tuple[Backend, ...], LIST] = Field(description="Backends, as addresses or as tables.")
    retry_secret_path: FilePath | None = Field(
        default=None,
        description="32 bytes, mode 0600; made if there is no such file. Required when `mint_retry`; the "
        "backends need it, too.",
    )
    max_quic_connections: Annotated[int, Range(1, 2_000_000)] = Field(
        default=100_000,
        description="Flows at once; every worker holds to an equal part. `runtime.max_inflight_connections` "
        "holds, too.",
    )
    min_client_dcid_len: Annotated[int, Range(8, 20, "bytes")] = Field(
        default=8, description="Shortest connection ID of a client's first packet."
    )
    per_flow_backlog: Annotated[int, Range(1, 8192)] = Field(
        default=32, description="Datagrams of a flow that wait while its backend's socket is full."
    )
    strict_source_binding: bool = Field(
        default=False, description="Drop packets of a flow from another address."
    )
    audit_throttle_window_secs: Annotated[int, Range(1, unit="seconds")] = Field(
        default=60, description="One log line per kind and source in this time."
    )
    max_dcid_len_routed: Annotated[int, Range(1, 20, "bytes")] = Field(
        default=20, description="Longest connection ID looked up."
    )
    mint_retry: bool = Field(
        default=False,
        description="Answer new clients with a Retry of our own; the backends must read our token.",
    )
    flow_idle_timeout_ms: Annotated[int, Range(1, unit="milliseconds", zero="off")] = Field(
        default=60_000, description="Silence after which a flow is forgotten."
    )
    per_ip_flow_cap: Annotated[int, Range(1, 2_000_000)] = Field(
        default=1024,
        description="Flows from one IPv4 address or IPv6 /64 network; every worker holds to an equal part. "
        "`runtime.per_ip_connection_cap` holds, too.",
    )
    cid_routing: CidRouting | None = Field(
        default=None, description="QUIC-LB; absent = learned connection IDs."
    )
    xdp: bool = Field(
        default=False,
        description="Have the kernel forward its packets, with `runtime.xdp_enabled`; needs `cid_routing` "
        "without `key`. The limits of flows in this table are those of what is served in user space.",
    )
    xdp_forwarding: Forwarding = Field(default="nat", description="With `xdp`: as of listeners.")

    @model_validator(mode="before")
    @classmethod
    def _tables_of_addresses(cls, data: object) -> object:
        if isinstance(data, dict) and isinstance(backends := data.get("backends"), list | tuple):
            tables = [{"address": entry} if isinstance(entry, str) else entry for entry in backends]
            return {**data, "backends": tables}
        return data

    def faults(self) -> Iterator[Fault]:
        if not self.backends:
            yield Fault(("backends",), "passthrough needs at least one backend")
        if self.mint_retry and self.retry_secret_path is None:
            yield Fault(
                ("mint_retry",),
                "mint_retry needs retry_secret_path",
                "name a file of 32 bytes with mode 0600",
                depends=(("retry_secret_path",),),
            )
        if self.max_dcid_len_routed < self.min_client_dcid_len:
            yield Fault(
                ("max_dcid_len_routed",),
                f"max_dcid_len_routed ({self.max_dcid_len_routed}) is below min_client_dcid_len "
                f"({self.min_client_dcid_len}), so no new client could be told from another",
                depends=(("min_client_dcid_len",),),
            )
        for index, backend in enumerate(self.backends):
            for key in ("protocol", "tls", "send_proxy"):
                if backend.is_set(key) and getattr(backend, key) not in ("tcp", False, None):
                    yield Fault(
                        ("backends", index, key),
                        f"{key} has no effect on QUIC that is passed through",
                        "remove the key",
                    )
        yield from set_faults(("backends",), self.backends)
        yield from self._server_id_faults()
        yield from self._xdp_faults()

    def is_idle(self, key: str) -> bool:
        return key == "xdp_forwarding" and not self.xdp

    def _xdp_faults(self) -> Iterator[Fault]:
        if not self.xdp:
            if self.is_set("xdp_forwarding"):
                yield Fault(
                    ("xdp_forwarding",),
                    "xdp_forwarding has no effect without xdp",
                    "set xdp = true, or remove the key",
                    depends=(("xdp",),),
                )
            return
        yield from vip_faults(("bind_addr",), self.bind_addr)
        yield from address_faults(("backends",), self.backends, self.bind_addr, self.xdp_forwarding)
        if self.cid_routing is None:
            yield Fault(
                ("xdp",),
                "xdp needs cid_routing: the kernel cannot learn connection IDs",
                "add a cid_routing table with config_id and server_id_length, or remove xdp",
                depends=(("cid_routing",),),
            )
        elif self.cid_routing.key is not None:
            yield Fault(
                ("cid_routing", "key"),
                "with xdp server ids are in the clear: the kernel's program does not decrypt",
                "remove key here and on the backends, or remove xdp",
                depends=(("xdp",),),
            )
        for key, why in (
            ("mint_retry", "the kernel answers no client"),
            ("strict_source_binding", "the kernel goes by server ids, whatever address they come from"),
        ):
            if getattr(self, key):
                yield Fault(
                    (key,),
                    f"{key} has no effect with xdp: {why}",
                    "remove one of the two",
                    depends=(("xdp",),),
                )

    def _server_id_faults(self) -> Iterator[Fault]:
        if self.cid_routing is None:
            return
        length = self.cid_routing.server_id_length
        if 1 + length + 4 > self.max_dcid_len_routed:
            yield Fault(
                ("max_dcid_len_routed",),
                f"connection IDs with server ids of {length} bytes have at least {length + 5} bytes, and no "
                f"more than {self.max_dcid_len_routed} are looked up",
                "raise max_dcid_len_routed, or use shorter server ids",
                depends=(("cid_routing",),),
            )
        for index, backend in enumerate(self.backends):
            if not re.fullmatch(f"[0-9a-f]{{{2 * length}}}", backend.id):
                yield Fault(
                    ("backends", index, "id"),
                    f"with cid_routing the id of a backend is its server id: {2 * length} hexadecimal digits "
                    f"(0-9, a-f), found {shown(backend.id)}",
                    f'as in id = "{index + 1:0{2 * length}x}"',
                    depends=(("cid_routing",),),
                )
