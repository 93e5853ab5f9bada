/* SPDX-License-Identifier: GPL-3.0-only
 *
 * What is read of a packet before anything is decided.
 */
#ifndef PACKET_H
#define PACKET_H

#include "maps.h"

#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>
#include <linux/udp.h>
#include <stdbool.h>

#include <bpf/bpf_endian.h>

#define HOP_NS 20000000ULL /* how long a next hop is believed in, and our own MAC */

#define MAX_EXTENSIONS 4
#define MAX_OFFSET 0x1ff /* of a transport header: 18 + 40 + 4 * 64, with what is longer not understood */

#define TCP_FIN 1
#define TCP_SYN 2
#define TCP_RST 4
#define TCP_ACK 16

struct vlan_header {
	__be16 tag;
	__be16 protocol;
};

/* Of both versions. The kernel's own headers of ICMP bring the C library's with them. */
struct icmp_header {
	__u8 type;
	__u8 code;
	__be16 checksum;
	__be32 rest; /* MTU of the next hop: in the last two bytes (IPv4) or in all (IPv6) */
};

enum {
	ICMP_UNREACHABLE = 3,
	ICMP_FRAGMENTATION_NEEDED = 4, /* a code of it */
	ICMP_TIME_EXCEEDED = 11,
	ICMP_PARAMETER_PROBLEM = 12,
	ICMPV6_UNREACHABLE = 1,
	ICMPV6_PACKET_TOO_BIG = 2,
	ICMPV6_PARAMETER_PROBLEM = 4,
};

struct extension {
	__u8 next;
	__u8 length; /* in units of 8 bytes, without the first */
	__u8 type;
	__u8 left;
};

struct packet {
	struct tuple tuple;
	__u32 network;	 /* offset of the IP header: 14, or 18 with a VLAN tag */
	__u32 transport; /* offset of the transport header */
	__u32 length;	 /* of the IP packet */
	__u8 is_v6;
	__u8 ttl;
	__u8 tcp_flags;
	__u8 may_fragment; /* IPv4 without DF */
	__u8 protocol;
};

/* What parsing ends with; also reasons (`layout.h`), all >= 0. */
#define UNDERSTOOD -1
#define NOT_OURS -2 /* nothing that IP, or not to our MAC: nobody counts it */

static __always_inline void map_v4(struct address *address, __be32 v4)
{
	address->words[0] = 0;
	address->words[1] = 0;
	address->words[2] = bpf_htonl(0xffff);
	address->words[3] = v4;
}

static __always_inline bool is_mapped(const struct address *address)
{
	return !address->words[0] && !address->words[1] && address->words[2] == bpf_htonl(0xffff);
}

static __always_inline void copy_v6(struct address *address, const struct in6_addr *v6)
{
	__builtin_memcpy(address, v6, sizeof(*address));
}

static __always_inline bool is_same(const struct address *one, const struct address *other)
{
	return one->words[3] == other->words[3] && one->words[2] == other->words[2] &&
	       one->words[1] == other->words[1] && one->words[0] == other->words[0];
}

/* Turned around: as an answer has them. */
static __always_inline void turn(struct tuple *turned, const struct tuple *tuple)
{
	turned->source = tuple->destination;
	turned->destination = tuple->source;
	turned->source_port = tuple->destination_port;
	turned->destination_port = tuple->source_port;
	turned->protocol = tuple->protocol;
	turned->zero = 0;
	turned->backend = tuple->backend;
}

static __always_inline int parse_v4(void *data, void *end, struct packet *packet)
{
	struct iphdr *ip = data + packet->network;
	__u32 size, length;

	if ((void *)(ip + 1) > end)
		return PASS_MALFORMED;
	size = ip->ihl * 4;
	length = bpf_ntohs(ip->tot_len);
	if (ip->version != 4 || size < sizeof(*ip) || length < size)
		return PASS_MALFORMED;
	if (length > end - data - packet->network)
		return PASS_MALFORMED;
	if (ip->frag_off & bpf_htons(0x3fff))
		return PASS_FRAGMENT;
	map_v4(&packet->tuple.source, ip->saddr);
	map_v4(&packet->tuple.destination, ip->daddr);
	packet->transport = packet->network + size;
	packet->length = length;
	packet->ttl = ip->ttl;
	packet->may_fragment = !(ip->frag_off & bpf_htons(0x4000));
	packet->protocol = ip->protocol;
	packet->is_v6 = 0;
	return UNDERSTOOD;
}

/* Past the extension headers that say nothing to a router (RFC 8200 4). */
static __always_inline int parse_v6(void *data, void *end, struct packet *packet)
{
	struct ipv6hdr *ip = data + packet->network;
	__u32 offset = packet->network + sizeof(*ip);
	__u32 length;
	__u8 next;

	if ((void *)(ip + 1) > end || ip->version != 6)
		return PASS_MALFORMED;
	length = bpf_ntohs(ip->payload_len) + sizeof(*ip);
	if (length == sizeof(*ip) || length > end - data - packet->network)
		return PASS_MALFORMED;
	next = ip->nexthdr;
#pragma unroll
	for (int i = 0; i < MAX_EXTENSIONS; i++) {
		struct extension *extension = data + (offset & MAX_OFFSET);

		if (next == IPPROTO_FRAGMENT)
			return PASS_FRAGMENT;
		if (next != IPPROTO_HOPOPTS && next != IPPROTO_DSTOPTS && next != IPPROTO_ROUTING)
			break;
		if ((void *)(extension + 1) > end)
			return PASS_MALFORMED;
		/* One that has still to be visited is the kernel's to refuse (RFC 5095). */
		if (next == IPPROTO_ROUTING && extension->left)
			return PASS_NOT_UNDERSTOOD;
		next = extension->next;
		offset += 8 + extension->length * 8;
		if (offset > MAX_OFFSET)
			return PASS_NOT_UNDERSTOOD;
	}
	if (next == IPPROTO_FRAGMENT)
		return PASS_FRAGMENT;
	if (offset - packet->network > length)
		return PASS_MALFORMED;
	copy_v6(&packet->tuple.source, &ip->saddr);
	copy_v6(&packet->tuple.destination, &ip->daddr);
	/* No such address is on a wire (RFC 4942 2.2); here it would be taken for the IPv4 address in it. */
	if (is_mapped(&packet->tuple.source) || is_mapped(&packet->tuple.destination))
		return PASS_NOT_UNDERSTOOD;
	packet->transport = offset;
	packet->length = length;
	packet->ttl = ip->hop_limit;
	packet->protocol = next;
	packet->may_fragment = 0;
	packet->is_v6 = 1;
	return UNDERSTOOD;
}

/* Ports, and what TCP says of the connection. */
static __always_inline int parse_transport(void *data, void *end, struct packet *packet)
{
	__u32 payload = packet->length - (packet->transport - packet->network);
	void *transport = data + (packet->transport & MAX_OFFSET);

	packet->tuple.protocol = packet->protocol;
	packet->tuple.zero = 0;
	packet->tuple.backend = 0;
	packet->tcp_flags = 0;
	if (packet->protocol == IPPROTO_TCP) {
		struct tcphdr *tcp = transport;

		if ((void *)(tcp + 1) > end || payload < sizeof(*tcp))
			return PASS_MALFORMED;
		if (tcp->doff < 5 || tcp->doff * 4 > payload)
			return PASS_MALFORMED;
		packet->tuple.source_port = tcp->source;
		packet->tuple.destination_port = tcp->dest;
		packet->tcp_flags = ((__u8 *)tcp)[13];
		return UNDERSTOOD;
	}
	if (packet->protocol == IPPROTO_UDP) {
		struct udphdr *udp = transport;

		if ((void *)(udp + 1) > end || payload < sizeof(*udp))
			return PASS_MALFORMED;
		if (bpf_ntohs(udp->len) < sizeof(*udp) || bpf_ntohs(udp->len) > payload)
			return PASS_MALFORMED;
		packet->tuple.source_port = udp->source;
		packet->tuple.destination_port = udp->dest;
		return UNDERSTOOD;
	}
	if (packet->protocol == (packet->is_v6 ? IPPROTO_ICMPV6 : IPPROTO_ICMP))
		return UNDERSTOOD;
	return PASS_NOT_UNDERSTOOD;
}

/* Of whom frames are that come in by a device, remembered for as long as a next hop is. */
struct inlet {
	__u64 until_ns;
	__u32 ifindex;
	__u8 mac[ETH_ALEN];
	__u8 is_ours; /* whether there is such a port */
};

static __noinline int refresh(struct inlet *inlet, __u32 ifindex, __u64 now)
{
	struct port *port = bpf_map_lookup_elem(&ports, &ifindex);

	inlet->ifindex = ifindex;
	inlet->until_ns = now + HOP_NS;
	inlet->is_ours = port != NULL;
	if (port)
		__builtin_memcpy(inlet->mac, port->mac, sizeof(inlet->mac));
	return 0;
}

/* Whether two MAC addresses, both at an even address, are the same. */
static __always_inline bool is_same_mac(const void *one, const void *other)
{
	const __u16 *a = one, *b = other;

	return a[0] == b[0] && a[1] == b[1] && a[2] == b[2];
}

static __always_inline int parse(struct xdp_md *ctx, struct packet *packet, struct inlet *inlet, __u64 now)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct ethhdr *ethernet = data;
	__be16 protocol;
	int parsed;

	if ((void *)(ethernet + 1) > end)
		return NOT_OURS;
	if (inlet->ifindex != ctx->ingress_ifindex || inlet->until_ns < now)
		refresh(inlet, ctx->ingress_ifindex, now);
	/* A switch may flood us with what is for others; backends in `dsr` have our addresses, but not our MAC. */
	if (!inlet->is_ours || !is_same_mac(ethernet->h_dest, inlet->mac))
		return NOT_OURS;
	protocol = ethernet->h_proto;
	packet->network = sizeof(*ethernet);
	if (protocol == bpf_htons(ETH_P_8021Q) || protocol == bpf_htons(ETH_P_8021AD)) {
		struct vlan_header *vlan = (void *)(ethernet + 1);

		if ((void *)(vlan + 1) > end)
			return NOT_OURS;
		protocol = vlan->protocol;
		packet->network += sizeof(*vlan);
	}
	if (protocol == bpf_htons(ETH_P_IP))
		parsed = parse_v4(data, end, packet);
	else if (protocol == bpf_htons(ETH_P_IPV6))
		parsed = parse_v6(data, end, packet);
	else
		return NOT_OURS;
	if (parsed != UNDERSTOOD)
		return parsed;
	return parse_transport(data, end, packet);
}

#endif
