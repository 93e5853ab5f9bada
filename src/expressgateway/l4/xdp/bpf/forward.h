/* SPDX-License-Identifier: GPL-3.0-only
 *
 * From a decision to a frame on its way: next hop, addresses, time to live, an outer header, MACs.
 */
#ifndef FORWARD_H
#define FORWARD_H

#include "checksum.h"
#include "flows.h"

#define AF_INET 2
#define AF_INET6 10

#define QUOTED 128 /* bytes of a packet that is too big, in the ICMP message that says so */
#define QUOTED_TTL 64

/* What an outer header takes. */
static __always_inline __u32 overhead_of(const struct way *way, bool is_v6)
{
	if (way->forwarding != FORWARD_DSR_ENCAPSULATED || way->direction != TO_BACKEND)
		return 0;
	return is_v6 ? sizeof(struct ipv6hdr) : sizeof(struct iphdr);
}

static __always_inline bool is_next(const struct bpf_fib_lookup *fib, const struct address *address, bool is_v6)
{
	if (!is_v6)
		return fib->ipv4_dst == address->words[3];
	return fib->ipv6_dst[0] == address->words[0] && fib->ipv6_dst[1] == address->words[1] &&
	       fib->ipv6_dst[2] == address->words[2] && fib->ipv6_dst[3] == address->words[3];
}

/* Why a packet has no next hop. */
static __always_inline int no_route(const struct way *way, long answer)
{
	if (!way->is_known)
		return PASS_NO_ROUTE;
	return answer == BPF_FIB_LKUP_RET_NO_NEIGH ? DROP_NO_NEIGHBOUR : DROP_NO_ROUTE;
}

#define TOO_BIG -3

/* Ask the kernel for the next hop, which is then in `way->hop`: UNDERSTOOD, TOO_BIG with the MTU there, or the
 * reason why there is none. */
static __noinline int ask(struct xdp_md *ctx, struct work *work, const struct packet *packet, const struct way *way)
{
	const struct address *source = &packet->tuple.source, *destination = way->backend;
	struct bpf_fib_lookup *fib = &work->fib;
	struct hop *hop = way->hop;
	struct port *port;
	__u32 leaves;
	long answer;

	if (way->forwarding == FORWARD_NAT) {
		source = &way->to->source;
		destination = &way->to->destination;
	} else if (overhead_of(way, packet->is_v6)) {
		source = way->source;
	}
	__builtin_memset(fib, 0, sizeof(*fib));
	fib->l4_protocol = packet->protocol;
	fib->tot_len = packet->length + overhead_of(way, packet->is_v6);
	fib->ifindex = ctx->ingress_ifindex;
	if (packet->is_v6) {
		fib->family = AF_INET6;
		__builtin_memcpy(fib->ipv6_src, source, sizeof(fib->ipv6_src));
		__builtin_memcpy(fib->ipv6_dst, destination, sizeof(fib->ipv6_dst));
	} else {
		fib->family = AF_INET;
		fib->ipv4_src = source->words[3];
		fib->ipv4_dst = destination->words[3];
	}
	answer = bpf_fib_lookup(ctx, fib, sizeof(*fib), 0);
	hop->until_ns = 0;
	hop->mtu = fib->mtu_result;
	if (answer == BPF_FIB_LKUP_RET_FRAG_NEEDED)
		return TOO_BIG;
	if (answer != BPF_FIB_LKUP_RET_SUCCESS)
		return no_route(way, answer);
	if (way->forwarding == FORWARD_DSR && !is_next(fib, way->backend, packet->is_v6))
		return DROP_NOT_ADJACENT;
	leaves = fib->ifindex;
	port = bpf_map_lookup_elem(&ports, &leaves);
	if (!port)
		return DROP_NO_PORT;
	hop->ifindex = port->ifindex;
	hop->vlan = port->vlan;
	hop->zero = 0;
	__builtin_memcpy(hop->destination, fib->dmac, sizeof(hop->destination));
	__builtin_memcpy(hop->source, fib->smac, sizeof(hop->source));
	hop->until_ns = bpf_ktime_get_coarse_ns() + HOP_NS;
	return UNDERSTOOD;
}

/* The next hop, asked for or remembered; see `ask`. */
static __always_inline int route(struct xdp_md *ctx, struct work *work, const struct packet *packet,
				 const struct way *way, __u64 now)
{
	if (way->hop->until_ns >= now && packet->length + overhead_of(way, packet->is_v6) <= way->hop->mtu)
		return UNDERSTOOD;
	return ask(ctx, work, packet, way);
}

/* A checksum over a header of ICMP and what it quotes, of a length known when compiling. */
static __always_inline __u16 icmp_check(void *header, __u32 length, __u64 pseudo)
{
	return folded((__u32)bpf_csum_diff(NULL, 0, header, length, 0) + pseudo);
}

/* Turn a packet into the message that it is too big, and send it back. Nothing has been changed in it before. */
static __noinline int answer_too_big(struct xdp_md *ctx, const struct packet *packet, __u32 vip, __u32 mtu)
{
	const int header4 = sizeof(struct iphdr) + sizeof(struct icmp_header);
	const int header6 = sizeof(struct ipv6hdr) + sizeof(struct icmp_header);
	const bool has_vlan = packet->network != sizeof(struct ethhdr);
	const bool is_v6 = packet->is_v6;
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	__u8 link[sizeof(struct ethhdr) + sizeof(struct vlan_header)] = {};
	struct vip_count *count = vip_count(vip);
	int size = end - data;
	__u8 mac;

	if (packet->may_fragment || packet->length < QUOTED)
		return ended(vip, DROP_TOO_BIG);
	if (data + sizeof(link) > end)
		return ended(vip, DROP_TOO_BIG);
	__builtin_memcpy(link, data, sizeof(link));
	for (int i = 0; i < ETH_ALEN; i++) {
		mac = link[i];
		link[i] = link[ETH_ALEN + i];
		link[ETH_ALEN + i] = mac;
	}
	if (bpf_xdp_adjust_tail(ctx, (int)packet->network + QUOTED - size))
		return ended(vip, DROP_NO_SPACE);
	if (bpf_xdp_adjust_head(ctx, is_v6 ? -header6 : -header4))
		return ended(vip, DROP_NO_SPACE);
	data = (void *)(long)ctx->data;
	end = (void *)(long)ctx->data_end;
	if (data + sizeof(link) > end)
		return ended(vip, DROP_NO_SPACE);
	if (has_vlan) {
		__builtin_memcpy(data, link, sizeof(link));
		data += sizeof(link);
	} else {
		__builtin_memcpy(data, link, sizeof(struct ethhdr));
		data += sizeof(struct ethhdr);
	}
	if (is_v6) {
		struct ipv6hdr *ip = data, *quoted = data + header6;
		struct icmp_header *icmp = (void *)(ip + 1);
		__u64 pseudo = bpf_htonl(sizeof(*icmp) + QUOTED) + (__u64)bpf_htonl(IPPROTO_ICMPV6);

		if ((void *)icmp + sizeof(*icmp) + QUOTED > end)
			return ended(vip, DROP_NO_SPACE);
		__builtin_memset(ip, 0, sizeof(*ip) + sizeof(*icmp));
		ip->version = 6;
		ip->payload_len = bpf_htons(sizeof(*icmp) + QUOTED);
		ip->nexthdr = IPPROTO_ICMPV6;
		ip->hop_limit = QUOTED_TTL;
		ip->saddr = quoted->daddr;
		ip->daddr = quoted->saddr;
		icmp->type = ICMPV6_PACKET_TOO_BIG;
		icmp->rest = bpf_htonl(mtu);
		pseudo += (__u32)bpf_csum_diff(NULL, 0, (void *)&ip->saddr, 32, 0);
		icmp->checksum = icmp_check(icmp, sizeof(*icmp) + QUOTED, pseudo);
	} else {
		struct iphdr *ip = data, *quoted = data + header4;
		struct icmp_header *icmp = (void *)(ip + 1);

		if ((void *)icmp + sizeof(*icmp) + QUOTED > end)
			return ended(vip, DROP_NO_SPACE);
		__builtin_memset(ip, 0, sizeof(*ip) + sizeof(*icmp));
		ip->version = 4;
		ip->ihl = 5;
		ip->tot_len = bpf_htons(header4 + QUOTED);
		ip->ttl = QUOTED_TTL;
		ip->protocol = IPPROTO_ICMP;
		ip->saddr = quoted->daddr;
		ip->daddr = quoted->saddr;
		ip->check = folded((__u32)bpf_csum_diff(NULL, 0, (void *)ip, sizeof(*ip), 0));
		icmp->type = ICMP_UNREACHABLE;
		icmp->code = ICMP_FRAGMENTATION_NEEDED;
		icmp->rest = bpf_htonl(mtu & 0xffff);
		icmp->checksum = icmp_check(icmp, sizeof(*icmp) + QUOTED, 0);
	}
	if (count)
		count->icmp_too_big++;
	return XDP_TX;
}

/* How much the sum over addresses grows when they become others. */
static __always_inline __u64 grown_addresses(const struct tuple *from, const struct tuple *to, bool is_v6)
{
	__u64 growth = 0;

	for (int i = is_v6 ? 0 : 3; i < 4; i++) {
		growth += grown32(from->source.words[i], to->source.words[i]);
		growth += grown32(from->destination.words[i], to->destination.words[i]);
	}
	return growth;
}

/* Write the network addresses of `to`; false cannot be. */
static __always_inline bool readdress(struct xdp_md *ctx, const struct packet *packet, const struct tuple *to,
				      __u64 growth)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;

	if (packet->is_v6) {
		struct ipv6hdr *ip = data + (packet->network & MAX_OFFSET);

		if ((void *)(ip + 1) > end)
			return false;
		__builtin_memcpy(&ip->saddr, &to->source, sizeof(ip->saddr));
		__builtin_memcpy(&ip->daddr, &to->destination, sizeof(ip->daddr));
	} else {
		struct iphdr *ip = data + (packet->network & MAX_OFFSET);

		if ((void *)(ip + 1) > end)
			return false;
		ip->saddr = to->source.words[3];
		ip->daddr = to->destination.words[3];
		ip->check = changed(ip->check, growth);
	}
	return true;
}

/* `nat`: addresses and ports become those of `to`. */
static __always_inline bool translate(struct xdp_md *ctx, const struct packet *packet, const struct tuple *to)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	void *transport = data + (packet->transport & MAX_OFFSET);
	__u64 growth = grown_addresses(&packet->tuple, to, packet->is_v6);

	if (!readdress(ctx, packet, to, growth))
		return false;
	growth += grown16(packet->tuple.source_port, to->source_port);
	growth += grown16(packet->tuple.destination_port, to->destination_port);
	if (packet->protocol == IPPROTO_TCP) {
		struct tcphdr *tcp = transport;

		if ((void *)(tcp + 1) > end)
			return false;
		tcp->source = to->source_port;
		tcp->dest = to->destination_port;
		tcp->check = changed(tcp->check, growth);
	} else {
		struct udphdr *udp = transport;

		if ((void *)(udp + 1) > end)
			return false;
		udp->source = to->source_port;
		udp->dest = to->destination_port;
		udp->check = changed_udp(udp->check, growth);
	}
	return true;
}

/* One hop less to live. */
static __always_inline bool age(struct xdp_md *ctx, const struct packet *packet)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;

	if (packet->is_v6) {
		struct ipv6hdr *ip = data + (packet->network & MAX_OFFSET);

		if ((void *)(ip + 1) > end)
			return false;
		ip->hop_limit--;
	} else {
		struct iphdr *ip = data + (packet->network & MAX_OFFSET);

		if ((void *)(ip + 1) > end)
			return false;
		ip->check = changed(ip->check, grown16(bpf_htons(ip->ttl << 8), bpf_htons((ip->ttl - 1) << 8)));
		ip->ttl--;
	}
	return true;
}

/* The header in front of an encapsulated packet (RFC 2003, RFC 2473), whose own TTL is the packet's. */
static __always_inline bool write_outer(void *header, void *end, const struct packet *packet, const struct way *way)
{
	if (packet->is_v6) {
		struct ipv6hdr *ip = header;

		if ((void *)(ip + 1) > end)
			return false;
		__builtin_memset(ip, 0, sizeof(*ip));
		ip->version = 6;
		ip->payload_len = bpf_htons(packet->length);
		ip->nexthdr = IPPROTO_IPV6;
		ip->hop_limit = QUOTED_TTL;
		__builtin_memcpy(&ip->saddr, way->source, sizeof(ip->saddr));
		__builtin_memcpy(&ip->daddr, way->backend, sizeof(ip->daddr));
	} else {
		struct iphdr *ip = header;

		if ((void *)(ip + 1) > end)
			return false;
		__builtin_memset(ip, 0, sizeof(*ip));
		ip->version = 4;
		ip->ihl = 5;
		ip->tot_len = bpf_htons(packet->length + sizeof(*ip));
		ip->frag_off = packet->may_fragment ? 0 : bpf_htons(0x4000);
		ip->ttl = QUOTED_TTL;
		ip->protocol = IPPROTO_IPIP;
		ip->saddr = way->source->words[3];
		ip->daddr = way->backend->words[3];
		ip->check = folded((__u32)bpf_csum_diff(NULL, 0, (void *)ip, sizeof(*ip), 0));
	}
	return true;
}

/* Give a packet its link header, and an outer one if it wants one, and send it off. */
static __always_inline int transmit(struct xdp_md *ctx, const struct packet *packet, const struct way *way)
{
	__u32 overhead = overhead_of(way, packet->is_v6);
	const struct hop *hop = way->hop;
	struct ethhdr *ethernet;
	__be16 protocol = bpf_htons(packet->is_v6 ? ETH_P_IPV6 : ETH_P_IP);
	__u32 link = sizeof(*ethernet) + (hop->vlan ? sizeof(struct vlan_header) : 0);
	int grown = (int)(link + overhead) - (int)packet->network;
	void *end;

	if (grown && bpf_xdp_adjust_head(ctx, -grown))
		return ended(way->vip, DROP_NO_SPACE);
	ethernet = (void *)(long)ctx->data;
	end = (void *)(long)ctx->data_end;
	if ((void *)(ethernet + 1) > end)
		return ended(way->vip, DROP_NO_SPACE);
	__builtin_memcpy(ethernet->h_dest, hop->destination, ETH_ALEN);
	__builtin_memcpy(ethernet->h_source, hop->source, ETH_ALEN);
	if (hop->vlan) {
		struct vlan_header *vlan = (void *)(ethernet + 1);

		if ((void *)(vlan + 1) > end)
			return ended(way->vip, DROP_NO_SPACE);
		vlan->protocol = protocol;
		vlan->tag = bpf_htons(hop->vlan);
		protocol = bpf_htons(ETH_P_8021Q);
		if (overhead && !write_outer(vlan + 1, end, packet, way))
			return ended(way->vip, DROP_NO_SPACE);
	} else if (overhead && !write_outer(ethernet + 1, end, packet, way)) {
		return ended(way->vip, DROP_NO_SPACE);
	}
	ethernet->h_proto = protocol;
	if (hop->ifindex == ctx->ingress_ifindex)
		return XDP_TX;
	return bpf_redirect(hop->ifindex, 0);
}

static __always_inline void count_sent(const struct packet *packet, const struct way *way)
{
	struct vip_count *of_vip = vip_count(way->vip);
	struct backend_count *of_backend = backend_count(way->number);

	if (!of_vip || !of_backend)
		return;
	if (way->direction == TO_BACKEND) {
		of_vip->in_packets++;
		of_vip->in_bytes += packet->length;
		of_backend->in_packets++;
		of_backend->in_bytes += packet->length;
	} else {
		of_vip->out_packets++;
		of_vip->out_bytes += packet->length;
		of_backend->out_packets++;
		of_backend->out_bytes += packet->length;
	}
}

#endif
