"""One client, one VIP and its backends: the packets between them, and what they have to become."""

import dataclasses
from typing import Any

from expressgateway.l4.xdp.layout import Forwarding
from tests.l4.xdp.packets import ACK, DF, SYN, TCP, Extension, Ip, Layer, Packet, Tcp, Udp, Vlan
from tests.l4.xdp.world import (
    BACK,
    BACKEND_PORT,
    BACKENDS,
    CLIENT,
    GATEWAY,
    PORT,
    VIP_PORT,
    Family,
    World,
)

NAT = Forwarding.FORWARD_NAT
DSR = Forwarding.FORWARD_DSR
ENCAPSULATED = Forwarding.FORWARD_DSR_ENCAPSULATED

CLIENT_PORT = 1234
OUTER_TTL = 64


def stage(world: World, family: Family, forwarding: Forwarding = NAT, *, backends: int = 1) -> None:
    """VIP 1 with so many backends, all of which are on `back`."""
    for number in range(1, backends + 1):
        world.backend(number, family.backend(number), family.source)
    world.vip(family.vip, *range(1, backends + 1), forwarding=forwarding)


def tcp(
    family: Family, flags: int = SYN, *, port: int = CLIENT_PORT, client: str = "", data: bytes = b""
) -> Packet:
    """From the client to the VIP."""
    return link(client or family.client, family.vip).tcp(port, VIP_PORT, flags).raw(data)


def udp(family: Family, data: bytes = b"question", *, port: int = CLIENT_PORT, client: str = "") -> Packet:
    return link(client or family.client, family.vip).udp(port, VIP_PORT).raw(data)


def link(source: str, destination: str, **ip: Any) -> Packet:
    """What comes in by `front`."""
    return Packet().ether(GATEWAY, CLIENT).ip(source, destination, **ip)


def tcp_answer(family: Family, flags: int = SYN | ACK, *, number: int = 1, data: bytes = b"") -> Packet:
    """From a backend to us, in `nat`."""
    return back_link(family, number).tcp(BACKEND_PORT, PORT, flags).raw(data)


def udp_answer(family: Family, data: bytes = b"answer", *, number: int = 1) -> Packet:
    return back_link(family, number).udp(BACKEND_PORT, PORT).raw(data)


def back_link(family: Family, number: int = 1) -> Packet:
    """What comes in by `back`."""
    return Packet().ether(BACK, BACKENDS[number]).ip(family.backend(number), family.source, ttl=61)


def to_backend(
    packet: Packet, family: Family, forwarding: Forwarding = NAT, *, number: int = 1, port: int = PORT
) -> Packet:
    """What a packet to the VIP becomes on its way to a backend on `back`."""
    sent = relinked(aged(packet), BACKENDS[number], BACK)
    if forwarding is NAT:
        return translated(sent, family.source, family.backend(number), port, BACKEND_PORT)
    return encapsulated(sent, family.source, family.backend(number)) if forwarding is ENCAPSULATED else sent


def to_client(packet: Packet, family: Family, *, port: int = CLIENT_PORT) -> Packet:
    """What an answer becomes."""
    return translated(relinked(aged(packet), CLIENT, GATEWAY), family.vip, family.client, VIP_PORT, port)


def relinked(packet: Packet, destination: bytes, source: bytes, vlan: int = 0) -> Packet:
    """With another link's header."""
    bare = packet.without("vlan").but(ether={"destination": destination, "source": source, "type": None})
    tag: tuple[Layer, ...] = (Vlan(vlan),) if vlan else ()
    return dataclasses.replace(bare, layers=(bare.layers[0], *tag, *bare.layers[1:]))


def aged(packet: Packet) -> Packet:
    return packet.but(ip={"ttl": first_ip(packet).ttl - 1})


def translated(packet: Packet, source: str, destination: str, source_port: int, port: int) -> Packet:
    ports = {"source": source_port, "destination": port}
    changed = packet.but(ip={"source": source, "destination": destination})
    return (
        changed.but(tcp=ports)
        if any(isinstance(each, Tcp) for each in packet.layers)
        else changed.but(udp=ports)
    )


def encapsulated(packet: Packet, source: str, destination: str) -> Packet:
    fragment = first_ip(packet).fragment & DF
    return packet.within(Ip(source, destination, ttl=OUTER_TTL, identification=0, fragment=fragment))


def first_ip(packet: Packet) -> Ip:
    return next(layer for layer in packet.layers if isinstance(layer, Ip))


def tagged(packet: Packet, tag: int, tpid: int = 0x8100) -> Packet:
    """With a VLAN tag behind the Ethernet header."""
    return dataclasses.replace(packet, layers=(packet.layers[0], Vlan(tag, tpid), *packet.layers[1:]))


def extended(packet: Packet, *extensions: Extension) -> Packet:
    """With extension headers behind the IPv6 header."""
    at = next(
        at for at, layer in enumerate(packet.layers) if isinstance(layer, Tcp | Udp) or layer.kind == 58
    )
    return dataclasses.replace(packet, layers=(*packet.layers[:at], *extensions, *packet.layers[at:]))


def begin(world: World, family: Family, protocol: int = TCP) -> None:
    """A flow of the client's, made by its first packet."""
    begun = world.send(tcp(family) if protocol == TCP else udp(family))
    assert begun.verdict != 2, "the flow did not begin"
