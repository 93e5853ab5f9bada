"""The shapes of what the API answers and of what it is asked: types for the code, schemas for `openapi`.

A client that reads answers has to expect members it does not know: later versions of the gateway add some.
"""

from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field

# Python 3.11 has no TypedDict that pydantic can read.
from typing_extensions import TypedDict

Result = Literal["applied", "unchanged", "invalid", "refused", "failed"]
Level = Literal["debug", "info", "warning", "error"]
Settable = Literal["ready", "draining", "disabled"]
Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0)]
When = Annotated[float, Field(description="Seconds since 1970.")]
Version = Annotated[int, Field(ge=1, description="Number of the configuration in force, from 1 at a start.")]


class Error(TypedDict):
    """Why something was not done. Every answer with a status of 400 or more is one."""

    error: Annotated[str, Field(description="A sentence.")]
    details: NotRequired[Annotated[list[str], Field(description="A sentence for each thing that is wrong.")]]
    result: NotRequired[Result]
    version: NotRequired[Version]
    plan: NotRequired[list[str]]


class Running(TypedDict):
    """The configuration in force."""

    path: str
    version: Version
    applied_at: When


class LastReload(TypedDict):
    requested: Annotated[Count, Field(description="Reloads asked for since the start.")]
    finished: Annotated[Count, Field(description="Of those, how many are done; some may have shared one.")]
    last_result: Result | None
    last_report: list[str]


class LastUpgrade(TypedDict):
    requested: Annotated[Count, Field(description="Upgrades asked for since the start.")]
    finished: Annotated[Count, Field(description="Of those, how many came to nothing: this process went on.")]
    last_failure: str | None


class ListenerState(TypedDict):
    name: str
    protocol: str
    bound: Annotated[str, Field(description="Address and port, as the kernel gave them.")]
    open: Annotated[Count, Field(description="Connections, or flows, open.")]


class WorkerState(TypedDict):
    index: Count
    pid: int | None
    state: str
    restarts: Annotated[Count, Field(description="Replacements of workers that died.")]
    deaths_in_a_row: Annotated[
        Count,
        Field(description="Workers that died here soon after their start; more than one is a crash loop."),
    ]


class Status(TypedDict):
    """The gateway in one look."""

    pid: int
    version: Annotated[str, Field(description="Of the program.")]
    state: Annotated[str, Field(description="`booting`, `serving`, `settling`, `draining` or `stopped`.")]
    uptime_s: Seconds
    config: Running
    reload: LastReload
    upgrade: LastUpgrade
    listeners: list[ListenerState]
    workers: list[WorkerState]


class EffectiveConfig(TypedDict):
    """The configuration in force with all its defaults, without its secrets."""

    path: str
    version: Version
    applied_at: When
    changes: Annotated[
        dict[str, list[str]], Field(description="By pool, what was changed while it ran and is in no file.")
    ]
    config: Annotated[
        dict[str, Any],
        Field(description="As `expressgateway schema` describes it. `(redacted)` stands for a secret."),
    ]


class Listener(ListenerState):
    address: Annotated[str, Field(description="As configured.")]
    tls: Annotated[bool, Field(description="Whether clients' TLS, or QUIC, ends here.")]
    connections: Annotated[Count, Field(description="Accepted since the start.")]
    requests: Annotated[Count, Field(description="Exchanges that ended; 0 where none can be seen.")]
    drain_timeout_ms: Count
    drain_jitter_ms: Count


class Listeners(TypedDict):
    listeners: list[Listener]


class Worker(WorkerState):
    hangs: Annotated[Count, Field(description="Workers killed because they said nothing any more.")]
    replacements: Annotated[
        dict[str, int], Field(description="Of workers that lived, by cause: `memory`, `reload`.")
    ]
    uptime_s: Seconds | None
    rss_bytes: Annotated[Count, Field(description="Resident memory.")]
    cpu_s: Annotated[Seconds, Field(description="Of all workers that were in this place.")]
    loop_lag_s: Annotated[Seconds | None, Field(description="How late the last sweep was.")]
    open: Annotated[Count, Field(description="Clients' connections and flows.")]
    config_version: Annotated[int, Field(ge=0, description="0 before the first.")]


class Workers(TypedDict):
    workers: list[Worker]


class Standing(TypedDict):
    """How one address of a backend does."""

    state: str
    since: When | None
    cause: str
    last_probe: dict[str, Any] | None
    in_flight: Count
    open: Count
    requests: Count


class AddressOf(Standing):
    """One of the addresses that a backend's name resolves to."""

    id: str
    address: str


class Backend(AddressOf):
    protocol: str
    tls: bool
    weight: Count
    resolved: NotRequired[list[AddressOf]]


class Pool(TypedDict):
    name: str
    listeners: list[str]
    policy: str
    panic: Annotated[bool, Field(description="Too few backends are well, so all are used.")]
    changes: Annotated[list[str], Field(description="What was changed while it ran and is in no file.")]
    backends: list[Backend]
    warning: NotRequired[str]


class Pools(TypedDict):
    pools: list[Pool]


class Backends(TypedDict):
    backends: list[Backend]


class BackendOfPool(Backend):
    pool: str


class AllBackends(TypedDict):
    backends: list[BackendOfPool]


class Certificates(TypedDict):
    certificates: list[dict[str, Any]]


class Connection(TypedDict):
    listener: str
    worker: Count
    protocol: str
    client: Annotated[str, Field(description="Address and port.")]
    age_s: Seconds
    requests: Annotated[Count | None, Field(description="Begun on it; null where none can be seen.")]
    state: Annotated[str, Field(description="`opening`, `idle`, `active` or `closing`.")]


class OpenOf(TypedDict):
    name: str
    open: Count
    protocols: Annotated[dict[str, int], Field(description="Of those that were looked at.")]


class Connections(TypedDict):
    """Clients' connections: all are counted, some are looked at, and a few of those are listed."""

    open: Count
    looked_at: Count
    silent_workers: Annotated[list[int], Field(description="Those that did not answer in time.")]
    listeners: list[OpenOf]
    listed: Annotated[list[Connection], Field(description="The oldest first.")]


class Log(TypedDict):
    level: Level


class Done(TypedDict):
    """What became of a write that succeeded."""

    result: Result
    version: Version
    plan: NotRequired[Annotated[list[str], Field(description="What was changed, line by line.")]]
    persisted: NotRequired[Annotated[bool, Field(description="Whether the file says so too: never.")]]
    note: NotRequired[str]
    warning: NotRequired[str]
    state: NotRequired[Settable]
    addresses: NotRequired[Annotated[list[str], Field(description="Those that were given the state.")]]


class Draining(TypedDict):
    state: Literal["draining"]
    note: str


class XdpInterface(TypedDict):
    """A network interface that the program is to be attached to."""

    name: str
    ifindex: Annotated[int, Field(ge=0, description="0: there is none.")]
    mode: Annotated[str, Field(description="`native`, `skb` or `hw`; empty where it is not attached.")]
    is_attached: bool
    fault: Annotated[str, Field(description="Why it is not, as a phrase.")]


class XdpTraffic(TypedDict):
    """What the kernel has forwarded since the program was loaded first."""

    in_packets: Annotated[Count, Field(description="To backends.")]
    in_bytes: Count
    out_packets: Annotated[Count, Field(description="To clients; those of `dsr` do not come by here.")]
    out_bytes: Count
    flows: Annotated[Count, Field(description="Flows begun.")]


class XdpListener(XdpTraffic):
    name: str
    address: str
    protocol: str
    forwarding: str
    pool: str
    backends: Annotated[Count, Field(description="Those that get new flows.")]
    stateless_packets: Annotated[Count, Field(description="Sent by the table alone, without a flow.")]
    passed: Annotated[dict[str, int], Field(description="Packets left to the kernel's stack, by reason.")]
    dropped: Annotated[dict[str, int], Field(description="Packets dropped, by reason.")]


class XdpBackend(XdpTraffic):
    pool: str
    id: str


class XdpLeftOut(TypedDict):
    """A backend that gets nothing from the kernel."""

    pool: str
    backend: str
    cause: str


class Xdp(TypedDict):
    """The XDP data plane."""

    state: Annotated[
        Literal["off", "attached", "partly attached", "not attached", "leaving", "detached"],
        Field(
            description="`leaving`: it was turned off, and its flows may end. `detached`: an operator took "
            "it away, until the next reload or start."
        ),
    ]
    fault: Annotated[str, Field(description="Why the kernel does not do all that is wanted; else empty.")]
    pin_path: str | None
    program_id: int | None
    is_adopted: Annotated[bool, Field(description="Whether flows of a process before this one go on.")]
    flows: Annotated[Count, Field(description="That the kernel knows now.")]
    flows_ipv4: Count
    flows_ipv6: Count
    flows_opening: Annotated[Count, Field(description="Of them, those without a second packet so far.")]
    max_flows: Annotated[Count, Field(description="Of each address family.")]
    flows_ended: Annotated[Count, Field(description="Since this process has had the program.")]
    evictions: Annotated[Count, Field(description="Flows that had to make room for others, since then.")]
    next_hops: Annotated[Count, Field(description="Neighbours that are kept resolved.")]
    interfaces: list[XdpInterface]
    listeners: list[XdpListener]
    backends: list[XdpBackend]
    left_out: list[XdpLeftOut]
    nobodys: Annotated[
        dict[str, int], Field(description="Packets that were no listener's and not understood, by reason.")
    ]


class XdpFlow(TypedDict):
    listener: str
    protocol: str
    client: Annotated[str, Field(description="Address and port.")]
    vip: str
    forwarding: str
    pool: str
    backend: str
    source: Annotated[str, Field(description="`nat`: what the backend sees as its client; else empty.")]
    state: Annotated[str, Field(description="`opening`, `open`, `closing` or `reset`.")]
    idle_s: Seconds


class XdpFlows(TypedDict):
    flows: list[XdpFlow]
    total: Annotated[Count, Field(description="How many there are, those that are not listed included.")]


class XdpDetached(TypedDict):
    state: Literal["detached", "off"]
    note: str


# -- what is asked


class Write(TypedDict):
    """Every body that asks for a change may say what it is based on."""

    version: NotRequired[Annotated[int, Field(description="The version seen: if it is another now, 409.")]]


class PatchBackend(Write):
    """At least one of both."""

    weight: NotRequired[Annotated[int, Field(ge=0, le=65535)]]
    state: NotRequired[
        Annotated[
            Settable,
            Field(
                description="`ready` leaves the rest to health, `draining` gives no new work and lets what "
                "is bound to it go on, `disabled` gives nothing at all."
            ),
        ]
    ]


class PatchLog(Write):
    level: Level
