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

/* Send on what has a way: what every packet has to pass, and then off. */
static __noinline int forward(struct xdp_md *ctx, struct work *work)
{
	const struct packet *packet = &work->packet;
	const struct way *way = &work->way;
	int verdict;

	if (way->forwarding == FORWARD_NAT && !translate(ctx, packet, &way->to))
		return ended(way->vip, PASS_MALFORMED);
	if (!age(ctx, packet))
		return ended(way->vip, PASS_MALFORMED);
	verdict = transmit(ctx, work);
	if (verdict == XDP_TX || verdict == XDP_REDIRECT)
		count_sent(packet, way);
	return verdict;
}

/* What a packet on its way has to pass: UNDERSTOOD with the next hop in `work->fib`, or a verdict. */
static __noinline int check_way(struct xdp_md *ctx, struct work *work)
{
	const struct packet *packet = &work->packet;
	const struct way *way = &work->way;
	long answer;

	if (packet->ttl <= 1)
		return ended(way->vip, DROP_TTL);
	answer = route(ctx, work);
	if (answer == BPF_FIB_LKUP_RET_FRAG_NEEDED)
		return answer_too_big(ctx, work, work->fib.mtu_result - overhead_of(way, packet->is_v6));
	if (answer != BPF_FIB_LKUP_RET_SUCCESS)
		return ended(way->vip, no_route(way, answer));
	if (way->forwarding == FORWARD_DSR && !is_next(&work->fib, &way->backend, packet->is_v6))
		return ended(way->vip, DROP_NOT_ADJACENT);
	return UNDERSTOOD;
}

static __always_inline void aim(struct way *way, const struct packet *packet, const struct backend *backend)
{
	way->backend = backend->address;
	way->source = backend->source;
	way->to.source = backend->source;
	way->to.destination = backend->address;
	way->to.source_port = 0;
	way->to.destination_port = backend->port;
	way->to.protocol = packet->protocol;
	way->to.zero = 0;
	way->to.backend = 0;
}

/* A packet that no flow is known for. `named`: the backend that a server ID names, or 0. */
static __noinline int to_somebody(struct xdp_md *ctx, struct work *work, const struct vip *vip, __u32 named)
{
	struct settings *settings = get_settings();
	struct packet *packet = &work->packet;
	struct way *way = &work->way;
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
	way->vip = vip->number;
	way->direction = TO_BACKEND;
	way->forwarding = vip->forwarding;
	way->is_known = 0;
	way->number = named;
	if (!named)
		way->number =
			drawn_backend(vip, hash_of(&packet->tuple, vip->flags & VIP_BY_ADDRESS, settings->seed));
	backend = living_backend(way->number);
	if (!backend)
		return ended(vip->number, PASS_NO_BACKEND);
	aim(way, packet, backend);
	reason = check_way(ctx, work);
	if (reason != UNDERSTOOD)
		return reason;
	if (is_remembered && !may_begin(settings)) {
		if (vip->forwarding == FORWARD_NAT)
			return ended(vip->number, PASS_OVER_CAP);
		is_remembered = false;
	}
	if (is_remembered) {
		reason = begin(work, settings, backend, vip->flags & VIP_SERVER_IDS ? FLOW_SERVER_IDS : 0);
		if (reason != UNDERSTOOD)
			return ended(vip->number, reason);
	} else {
		count = vip_count(vip->number);
		if (count)
			count->stateless++;
	}
	return forward(ctx, work);
}

/* A packet of a flow that goes on. */
static __always_inline int along(struct xdp_md *ctx, struct work *work, struct flow *flow,
				 const struct backend *backend)
{
	struct way *way = &work->way;
	int verdict;

	way->to = flow->to;
	way->vip = flow->vip;
	way->number = flow->backend;
	way->direction = flow->direction;
	way->forwarding = flow->forwarding;
	way->is_known = 1;
	if (backend) {
		way->backend = backend->address;
		way->source = backend->source;
	}
	verdict = check_way(ctx, work);
	if (verdict != UNDERSTOOD)
		return verdict;
	note(work, flow);
	return forward(ctx, work);
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

static __always_inline int balance_packet(struct xdp_md *ctx, struct work *work)
{
	struct packet *packet = &work->packet;
	struct flow *flow = find(&packet->tuple, packet->is_v6);
	struct backend *backend;
	struct settings *settings;
	struct vip *vip = NULL;
	__u32 named = 0;

	if (flow && flow->direction == TO_CLIENT)
		return along(ctx, work, flow, NULL);
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
		return vip ? to_somebody(ctx, work, vip, named) : XDP_PASS;

	settings = get_settings();
	if (settings && settings->denies && is_denied(packet))
		return ended(flow->vip, DROP_DENIED);
	backend = living_backend(flow->backend);
	if (backend && backend->generation == flow->generation && !(begins(packet) && has_ended(flow->flags)))
		return along(ctx, work, flow, backend);

	/* It is over. */
	forget_pair(work, flow);
	if (!begins(packet))
		return ended(flow->vip, PASS_NO_FLOW);
	vip = vip_of(packet);
	return vip ? to_somebody(ctx, work, vip, named) : XDP_PASS;
}

SEC("xdp")
int balance(struct xdp_md *ctx)
{
	struct work *work = get_work();
	int parsed;

	if (!work)
		return XDP_PASS;
	__builtin_memset(&work->packet, 0, sizeof(work->packet));
	parsed = parse(ctx, &work->packet);
	if (parsed == NOT_OURS)
		return XDP_PASS;
	if (parsed != UNDERSTOOD)
		return ended(0, parsed);
	if (work->packet.protocol == IPPROTO_TCP || work->packet.protocol == IPPROTO_UDP)
		return balance_packet(ctx, work);
	return follow(ctx, work);
}

/* -- Removing what has ended */

struct sweeping {
	struct sweep *sweep;
	struct settings *settings;
	__u64 now;
	__u64 flows;
	__u64 entries;
	__u64 removed;
	bool is_v6;
};

static __always_inline __u64 lives_ns(const struct settings *settings, __u8 protocol, __u8 flags)
{
	if (protocol != IPPROTO_TCP)
		return settings->udp_idle_ns;
	return has_ended(flags) || flags & FLOW_SYN ? settings->closing_ns : settings->tcp_idle_ns;
}

static __always_inline long sweep_one(struct tuple *key, struct flow *flow, struct sweeping *sweeping)
{
	struct flow *other = NULL;
	__u64 seen = flow->seen_ns;
	struct tuple twin;

	sweeping->entries++;
	if (flow->forwarding == FORWARD_NAT) {
		turn(&twin, &flow->to);
		other = find(&twin, sweeping->is_v6);
	}
	if (flow->direction == TO_CLIENT) {
		/* What has lost its other half, to the table's being full, is of no use. */
		if (!other && sweeping->now - seen > sweeping->settings->closing_ns)
			forget(key, sweeping->is_v6);
		return 0;
	}
	if (other && other->seen_ns > seen)
		seen = other->seen_ns;
	if (sweeping->now > seen &&
	    sweeping->now - seen > lives_ns(sweeping->settings, key->protocol, flow->flags)) {
		if (other)
			forget(&twin, sweeping->is_v6);
		forget(key, sweeping->is_v6);
		sweeping->removed++;
	} else {
		sweeping->flows++;
	}
	return 0;
}

static long sweep_entry(void *map, struct tuple *key, struct flow *flow, struct sweeping *sweeping)
{
	return sweep_one(key, flow, sweeping);
}

SEC("syscall")
int sweep(struct sweep *result)
{
	struct sweeping sweeping = { .settings = get_settings(), .now = bpf_ktime_get_ns() };

	if (!sweeping.settings)
		return 1;
	bpf_for_each_map_elem(&flows4, sweep_entry, &sweeping, 0);
	result->flows4 = sweeping.flows;
	sweeping.flows = 0;
	sweeping.is_v6 = true;
	bpf_for_each_map_elem(&flows6, sweep_entry, &sweeping, 0);
	result->flows6 = sweeping.flows;
	result->entries = sweeping.entries;
	result->removed = sweeping.removed;
	return 0;
}
