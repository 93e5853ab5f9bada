// SPDX-License-Identifier: GPL-3.0-only
/*
 * Layer 4 balancing in the driver: see docs/xdp.md.
 *
 * A packet to a VIP goes to a backend. Which one, its flow remembers, or the VIP's table says. What is not for a
 * VIP, and whatever the program does not understand, is left to the kernel's stack as it came.
 */
#include "forward.h"
#include "icmp.h"
#include "quic.h"

char LICENSE[] SEC("license") = "GPL";

/* Send on what has a way and a next hop. */
static __always_inline int send(struct xdp_md *ctx, const struct packet *packet, const struct way *way)
{
	int verdict;

	if (way->forwarding == FORWARD_NAT && !translate(ctx, packet, way->to))
		return ended(way->vip, PASS_MALFORMED);
	if (!age(ctx, packet))
		return ended(way->vip, PASS_MALFORMED);
	verdict = transmit(ctx, packet, way);
	if (verdict == XDP_TX || verdict == XDP_REDIRECT)
		count_sent(packet, way);
	return verdict;
}

/* What a packet on its way has to pass: UNDERSTOOD, or a verdict. */
static __always_inline int check_way(struct xdp_md *ctx, struct work *work, const struct packet *packet,
				     const struct way *way, __u64 now)
{
	int routed;

	if (packet->ttl <= 1)
		return ended(way->vip, DROP_TTL);
	routed = route(ctx, work, packet, way, now);
	if (routed == UNDERSTOOD)
		return UNDERSTOOD;
	if (routed == TOO_BIG)
		return answer_too_big(ctx, packet, way->vip, way->hop->mtu - overhead_of(way, packet->is_v6));
	return ended(way->vip, routed);
}

/* What a packet to a backend becomes in `nat`, but for the port that it gets. */
static __always_inline void aim(struct tuple *to, const struct packet *packet, const struct backend *backend)
{
	to->source = backend->source;
	to->destination = backend->address;
	to->source_port = 0;
	to->destination_port = backend->port;
	to->protocol = packet->protocol;
	to->zero = 0;
	to->backend = 0;
}

/* A packet that no flow is known for. `named`: the backend that a server ID names, or 0. */
static __noinline int to_somebody(struct xdp_md *ctx, struct work *work, const struct packet *packet,
				  const struct vip *vip, __u32 named)
{
	struct settings *settings = get_settings();
	struct way way = { .to = &work->flow.to, .hop = &work->hop };
	struct backend *backend;
	struct vip_count *count;
	bool is_remembered;
	int reason;

	if (!settings || !vip)
		return XDP_PASS;
	if (settings->denies && is_denied(packet))
		return ended(vip->number, DROP_DENIED);
	is_remembered = begins(packet);
	if (!is_remembered && vip->forwarding == FORWARD_NAT)
		return ended(vip->number, PASS_NO_FLOW);
	way.vip = vip->number;
	way.direction = TO_BACKEND;
	way.forwarding = vip->forwarding;
	way.number = named;
	if (!named)
		way.number =
			drawn_backend(vip, hash_of(&packet->tuple, vip->flags & VIP_BY_ADDRESS, settings->seed));
	backend = living_backend(way.number);
	if (!backend)
		return ended(vip->number, PASS_NO_BACKEND);
	way.backend = &backend->address;
	way.source = &backend->source;
	aim(&work->flow.to, packet, backend);
	work->hop.until_ns = 0;
	reason = check_way(ctx, work, packet, &way, 1);
	if (reason != UNDERSTOOD)
		return reason;
	if (is_remembered && !may_begin(settings)) {
		if (vip->forwarding == FORWARD_NAT)
			return ended(vip->number, PASS_OVER_CAP);
		is_remembered = false;
	}
	if (is_remembered) {
		reason = begin(work, packet, settings, &way, backend->generation,
			       vip->flags & VIP_SERVER_IDS ? FLOW_SERVER_IDS : 0);
		if (reason != UNDERSTOOD)
			return ended(vip->number, reason);
	} else {
		count = vip_count(vip->number);
		if (count)
			count->stateless++;
	}
	return send(ctx, packet, &way);
}

/* A packet of a flow that goes on. */
static __always_inline int along(struct xdp_md *ctx, struct work *work, const struct packet *packet,
				 struct flow *flow, const struct backend *backend, __u64 now)
{
	struct way way = {
		.to = &flow->to,
		.backend = backend ? &backend->address : &flow->to.destination,
		.source = backend ? &backend->source : &flow->to.source,
		.hop = &flow->hop,
		.vip = flow->vip,
		.number = flow->backend,
		.direction = flow->direction,
		.forwarding = flow->forwarding,
		.is_known = 1,
	};
	int verdict = check_way(ctx, work, packet, &way, now);

	if (verdict != UNDERSTOOD)
		return verdict;
	note(work, packet, flow, now);
	return send(ctx, packet, &way);
}

static __always_inline struct vip *vip_of(const struct packet *packet)
{
	struct vip_key key = {
		.address = packet->tuple.destination,
		.port = packet->tuple.destination_port,
		.protocol = packet->protocol,
	};

	return bpf_map_lookup_elem(&vips, &key);
}

static __always_inline int balance_packet(struct xdp_md *ctx, struct work *work, struct packet *packet, __u64 now)
{
	struct flow *flow = find(&packet->tuple, packet->is_v6);
	struct backend *backend = NULL;
	struct settings *settings;
	struct vip *vip = NULL;
	__u32 named = 0;
	bool is_over;

	if (!flow || flow->flags & FLOW_SERVER_IDS) {
		vip = vip_of(packet);
		if (vip && vip->flags & VIP_SERVER_IDS)
			named = named_backend(ctx, packet, vip);
		if (flow && named && named != flow->backend) {
			/* Another connection from the same port, of another backend. */
			packet->tuple.backend = named;
			flow = find(&packet->tuple, packet->is_v6);
		}
	}
	if (!flow)
		return vip ? to_somebody(ctx, work, packet, vip, named) : XDP_PASS;
	if (flow->direction == TO_BACKEND) {
		settings = get_settings();
		if (settings && settings->denies && is_denied(packet))
			return ended(flow->vip, DROP_DENIED);
		backend = living_backend(flow->backend);
		is_over = !backend || backend->generation != flow->generation ||
			  (begins(packet) && has_ended(flow->flags));
		if (!is_over && flow->flags & FLOW_OPENING && !(packet->tcp_flags & TCP_SYN)) {
			is_over = !establish(work, packet, flow);
			if (!is_over)
				flow = find_in(&packet->tuple, packet->is_v6, false);
			if (!flow)
				return ended(0, DROP_RACE);
		}
		if (is_over) {
			forget_pair(work, packet, flow);
			if (!begins(packet))
				return ended(flow->vip, PASS_NO_FLOW);
			vip = vip_of(packet);
			return vip ? to_somebody(ctx, work, packet, vip, named) : XDP_PASS;
		}
	}
	return along(ctx, work, packet, flow, backend, now);
}

SEC("xdp")
int balance(struct xdp_md *ctx)
{
	__u64 now = bpf_ktime_get_coarse_ns();
	struct work *work = get_work();
	struct packet packet;
	int parsed;

	if (!work)
		return XDP_PASS;
	parsed = parse(ctx, &packet, &work->inlet, now);
	if (parsed == NOT_OURS)
		return XDP_PASS;
	if (parsed != UNDERSTOOD)
		return ended(0, parsed);
	if (packet.protocol == IPPROTO_TCP || packet.protocol == IPPROTO_UDP)
		return balance_packet(ctx, work, &packet, now);
	return follow(ctx, work, &packet);
}

/* -- Removing what has ended */

struct sweeping {
	struct settings *settings;
	__u64 now;
	__u64 flows;
	__u64 opening;
	__u64 entries;
	__u64 removed;
};

static __always_inline __u64 lives_ns(const struct settings *settings, __u8 protocol, __u8 flags)
{
	if (protocol != IPPROTO_TCP)
		return settings->udp_idle_ns;
	return has_ended(flags) || flags & FLOW_OPENING ? settings->closing_ns : settings->tcp_idle_ns;
}

/* Whether a flow, or what is left of it, has ended; then its other half is gone. */
static __always_inline bool is_over(struct sweeping *sweeping, struct flow *flow, __u8 protocol, bool is_v6)
{
	struct flow *other = NULL;
	__u64 seen = flow->seen_ns;
	struct tuple twin;

	sweeping->entries++;
	if (flow->forwarding == FORWARD_NAT) {
		turn(&twin, &flow->to);
		other = find(&twin, is_v6);
	}
	if (flow->direction == TO_CLIENT)
		/* What has lost its other half, to the table's being full, is of no use. */
		return !other && sweeping->now - seen > sweeping->settings->closing_ns;
	if (other && other->seen_ns > seen)
		seen = other->seen_ns;
	if (sweeping->now < seen || sweeping->now - seen <= lives_ns(sweeping->settings, protocol, flow->flags)) {
		sweeping->flows++;
		sweeping->opening += flow->flags & FLOW_OPENING;
		return false;
	}
	if (other)
		forget(&twin, is_v6);
	sweeping->removed++;
	return true;
}

static long sweep4(void *map, struct tuple4 *key, struct flow *flow, struct sweeping *sweeping)
{
	if (is_over(sweeping, flow, key->protocol, false))
		bpf_map_delete_elem(map, key);
	return 0;
}

static long sweep6(void *map, struct tuple *key, struct flow *flow, struct sweeping *sweeping)
{
	if (is_over(sweeping, flow, key->protocol, true))
		bpf_map_delete_elem(map, key);
	return 0;
}

SEC("syscall")
int sweep(struct sweep *result)
{
	struct sweeping sweeping = { .settings = get_settings(), .now = bpf_ktime_get_ns() };

	if (!sweeping.settings)
		return 1;
	bpf_for_each_map_elem(&flows4, sweep4, &sweeping, 0);
	bpf_for_each_map_elem(&opening4, sweep4, &sweeping, 0);
	result->flows4 = sweeping.flows;
	sweeping.flows = 0;
	bpf_for_each_map_elem(&flows6, sweep6, &sweeping, 0);
	bpf_for_each_map_elem(&opening6, sweep6, &sweeping, 0);
	result->flows6 = sweeping.flows;
	result->opening = sweeping.opening;
	result->entries = sweeping.entries;
	result->removed = sweeping.removed;
	return 0;
}
