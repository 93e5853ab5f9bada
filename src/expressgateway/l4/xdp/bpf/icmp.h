/* SPDX-License-Identifier: GPL-3.0-only
 *
 * ICMP errors about a packet of a flow follow the flow: they go where its packets come from, and what they quote is
 * what that side has sent (RFC 5508 4).
 */
#ifndef ICMP_H
#define ICMP_H

#include "forward.h"

/* What is read of the packet that an error quotes: its transport addresses, as they were on the wire. */
struct quote {
	struct tuple *tuple;
	__u32 network;
	__u32 transport;
	__u16 check; /* of UDP */
};

static __always_inline bool is_error(const struct packet *packet, __u8 type)
{
	if (packet->is_v6)
		return type >= ICMPV6_UNREACHABLE && type <= ICMPV6_PARAMETER_PROBLEM;
	return type == ICMP_UNREACHABLE || type == ICMP_TIME_EXCEEDED || type == ICMP_PARAMETER_PROBLEM;
}

static __always_inline bool read_quote(void *data, void *end, const struct packet *packet, struct quote *quote)
{
	struct udphdr *transport;

	quote->network = packet->transport + sizeof(struct icmp_header);
	if (packet->is_v6) {
		struct ipv6hdr *ip = data + (quote->network & MAX_OFFSET);

		if ((void *)(ip + 1) > end || ip->version != 6)
			return false;
		copy_v6(&quote->tuple->source, &ip->saddr);
		copy_v6(&quote->tuple->destination, &ip->daddr);
		quote->tuple->protocol = ip->nexthdr;
		quote->transport = quote->network + sizeof(*ip);
	} else {
		struct iphdr *ip = data + (quote->network & MAX_OFFSET);

		if ((void *)(ip + 1) > end || ip->version != 4 || ip->ihl < 5)
			return false;
		if (ip->frag_off & bpf_htons(0x1fff))
			return false;
		map_v4(&quote->tuple->source, ip->saddr);
		map_v4(&quote->tuple->destination, ip->daddr);
		quote->tuple->protocol = ip->protocol;
		quote->transport = quote->network + ip->ihl * 4;
	}
	if (quote->tuple->protocol != IPPROTO_TCP && quote->tuple->protocol != IPPROTO_UDP)
		return false;
	/* Where nothing is masked away: behind extension headers it may be too far. */
	if (quote->transport > MAX_OFFSET)
		return false;
	/* Eight bytes of it are always quoted: the ports, and UDP's checksum. What pads the frame is no quote. */
	if (quote->transport + sizeof(*transport) > packet->network + packet->length)
		return false;
	transport = data + (quote->transport & MAX_OFFSET);
	if ((void *)(transport + 1) > end)
		return false;
	quote->tuple->source_port = transport->source;
	quote->tuple->destination_port = transport->dest;
	if (quote->tuple->protocol == IPPROTO_UDP)
		quote->check = transport->check;
	return true;
}

/* Have an error quote `to`; `growth` is by how much the sum over the outer addresses has grown. */
static __always_inline bool requote(struct xdp_md *ctx, const struct packet *packet, const struct quote *quote,
				    const struct tuple *to, __u64 growth)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct udphdr *transport = data + (quote->transport & MAX_OFFSET);
	struct icmp_header *icmp = data + (packet->transport & MAX_OFFSET);
	__u64 inner = grown_addresses(quote->tuple, to, packet->is_v6), ports, all;

	if ((void *)(transport + 1) > end || (void *)(icmp + 1) > end)
		return false;
	ports = grown16(quote->tuple->source_port, to->source_port) +
		grown16(quote->tuple->destination_port, to->destination_port);
	all = inner + ports;
	if (packet->is_v6) {
		struct ipv6hdr *ip = data + (quote->network & MAX_OFFSET);

		if ((void *)(ip + 1) > end)
			return false;
		__builtin_memcpy(&ip->saddr, &to->source, sizeof(ip->saddr));
		__builtin_memcpy(&ip->daddr, &to->destination, sizeof(ip->daddr));
		all += growth; /* its checksum covers the addresses outside, too (RFC 4443 2.3) */
	} else {
		struct iphdr *ip = data + (quote->network & MAX_OFFSET);
		__u16 check;

		if ((void *)(ip + 1) > end)
			return false;
		check = ip->check;
		ip->saddr = to->source.words[3];
		ip->daddr = to->destination.words[3];
		ip->check = changed(check, inner);
		all += grown16(check, ip->check);
	}
	transport->source = to->source_port;
	transport->dest = to->destination_port;
	if (quote->tuple->protocol == IPPROTO_UDP && quote->check) {
		__u16 check = changed_udp(quote->check, inner + ports);

		transport->check = check;
		all += grown16(quote->check, check);
	}
	icmp->checksum = changed(icmp->checksum, all);
	return true;
}

/* An ICMP packet. */
static __noinline int follow(struct xdp_md *ctx, struct work *work, const struct packet *packet)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct icmp_header *icmp = data + (packet->transport & MAX_OFFSET);
	struct quote quote = { .tuple = &work->quoted };
	struct tuple *to = &work->to;
	struct way way = { .to = to, .hop = &work->hop, .is_known = 1 };
	struct backend *backend;
	struct vip_count *count;
	struct flow *flow;
	__u64 growth;
	int verdict;

	if ((void *)(icmp + 1) > end || !is_error(packet, icmp->type))
		return ended(0, PASS_NOT_UNDERSTOOD);
	__builtin_memset(&work->quoted, 0, sizeof(work->quoted));
	if (!read_quote(data, end, packet, &quote))
		return ended(0, PASS_NOT_UNDERSTOOD);
	/* Whom it is sent to has sent what it quotes: else it is not for us, or somebody made it up. */
	if (!is_same(&packet->tuple.destination, &work->quoted.source))
		return ended(0, PASS_NOT_UNDERSTOOD);
	/* The packet it quotes went the other way. */
	turn(&work->twin, &work->quoted);
	flow = find(&work->twin, packet->is_v6);
	if (!flow)
		return ended(0, PASS_NOT_UNDERSTOOD);
	way.vip = flow->vip;
	way.number = flow->backend;
	way.direction = flow->direction;
	way.forwarding = flow->forwarding;
	way.backend = &to->destination; /* of none, when it goes to a client */
	way.source = &to->source;
	if (flow->direction == TO_BACKEND) {
		backend = living_backend(flow->backend);
		if (!backend || backend->generation != flow->generation)
			return ended(way.vip, PASS_NO_FLOW);
		way.backend = &backend->address;
		way.source = &backend->source;
	}
	if (packet->ttl <= 1)
		return ended(way.vip, DROP_TTL);
	if (way.forwarding == FORWARD_NAT) {
		/* Whoever says it: the other end of the flow, which is known by another address, or a router. */
		to->source = packet->tuple.source;
		if (is_same(&packet->tuple.source, &work->twin.source))
			to->source = flow->to.source;
		to->destination = flow->to.destination;
		turn(&work->twin, &flow->to);
	}
	verdict = ask(ctx, work, packet, &way);
	if (verdict == TOO_BIG)
		return ended(way.vip, DROP_TOO_BIG);
	if (verdict != UNDERSTOOD)
		return ended(way.vip, verdict);
	if (way.forwarding == FORWARD_NAT) {
		growth = grown_addresses(&packet->tuple, to, packet->is_v6);
		if (!requote(ctx, packet, &quote, &work->twin, growth) || !readdress(ctx, packet, to, growth))
			return ended(way.vip, PASS_MALFORMED);
	}
	if (!age(ctx, packet))
		return ended(way.vip, PASS_MALFORMED);
	verdict = transmit(ctx, packet, &way);
	count = vip_count(way.vip);
	if (count && (verdict == XDP_TX || verdict == XDP_REDIRECT))
		count->icmp_followed++;
	return verdict;
}

#endif
