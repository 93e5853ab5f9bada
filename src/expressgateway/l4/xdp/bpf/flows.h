/* SPDX-License-Identifier: GPL-3.0-only
 *
 * Flows: which are known, who gets a new one, and what they leave behind.
 */
#ifndef FLOWS_H
#define FLOWS_H

#include "counts.h"
#include "packet.h"

#define SEEN_NS 10000000ULL /* how exactly it is known when a flow was last seen: not every packet writes */
#define PORTS_TRIED 16
#define PORT_STEP 7919

/* Where a packet goes. */
struct way {
	const struct tuple *to;	       /* `nat`: what it becomes */
	const struct address *backend; /* `dsr`: next; `dsr_encapsulated`: the outer destination */
	const struct address *source;  /* `dsr_encapsulated`: the outer source */
	struct hop *hop;
	__u32 vip;
	__u32 number; /* the backend's */
	__u8 direction;
	__u8 forwarding;
	__u8 is_known; /* whether somebody relies on it: a flow that is broken is not the kernel's to mend */
};

/* What is too large for a program's stack, for the while of one packet, and what this CPU remembers. */
struct work {
	struct inlet inlet;
	struct bpf_fib_lookup fib;
	struct flow flow;
	struct flow answers;
	struct tuple twin;
	struct tuple quoted;
	struct tuple to;
	struct hop hop;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct work);
} works SEC(".maps");

static __always_inline struct work *get_work(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&works, &zero);
}

static __always_inline struct tuple4 shortened(const struct tuple *tuple)
{
	return (struct tuple4){
		.source = tuple->source.words[3],
		.destination = tuple->destination.words[3],
		.source_port = tuple->source_port,
		.destination_port = tuple->destination_port,
		.protocol = tuple->protocol,
		.backend = tuple->backend,
	};
}

/* A flow in one of the tables, which `opening` chooses. */
static __always_inline struct flow *find_in(const struct tuple *tuple, bool is_v6, bool opening)
{
	struct tuple4 key;

	if (is_v6)
		return opening ? bpf_map_lookup_elem(&opening6, tuple) : bpf_map_lookup_elem(&flows6, tuple);
	key = shortened(tuple);
	return opening ? bpf_map_lookup_elem(&opening4, &key) : bpf_map_lookup_elem(&flows4, &key);
}

static __always_inline struct flow *find(const struct tuple *tuple, bool is_v6)
{
	struct flow *flow = find_in(tuple, is_v6, false);

	if (!flow)
		flow = find_in(tuple, is_v6, true);
	/* Between the two another CPU may have moved it (`establish`), which puts it there before it takes it here. */
	return flow ? flow : find_in(tuple, is_v6, false);
}

/* 0, or an error if there is one already. */
static __always_inline long put(const struct tuple *tuple, const struct flow *flow, bool is_v6, bool opening)
{
	struct tuple4 key;

	if (is_v6)
		return opening ? bpf_map_update_elem(&opening6, tuple, flow, BPF_NOEXIST) :
				 bpf_map_update_elem(&flows6, tuple, flow, BPF_NOEXIST);
	key = shortened(tuple);
	return opening ? bpf_map_update_elem(&opening4, &key, flow, BPF_NOEXIST) :
			 bpf_map_update_elem(&flows4, &key, flow, BPF_NOEXIST);
}

static __always_inline void forget_in(const struct tuple *tuple, bool is_v6, bool opening)
{
	struct tuple4 key;

	if (is_v6) {
		if (opening)
			bpf_map_delete_elem(&opening6, tuple);
		else
			bpf_map_delete_elem(&flows6, tuple);
	} else {
		key = shortened(tuple);
		if (opening)
			bpf_map_delete_elem(&opening4, &key);
		else
			bpf_map_delete_elem(&flows4, &key);
	}
}

static __always_inline void forget(const struct tuple *tuple, bool is_v6)
{
	forget_in(tuple, is_v6, false);
	forget_in(tuple, is_v6, true);
}

/* Both entries of a packet's flow to a backend. */
static __noinline int forget_pair(struct work *work, const struct packet *packet, const struct flow *flow)
{
	if (flow->forwarding == FORWARD_NAT) {
		turn(&work->twin, &flow->to);
		forget(&work->twin, packet->is_v6);
	}
	forget(&packet->tuple, packet->is_v6);
	return 0;
}

static __always_inline bool has_ended(__u8 flags)
{
	return flags & FLOW_RST || (flags & (FLOW_FIN | FLOW_TWIN_FIN)) == (FLOW_FIN | FLOW_TWIN_FIN);
}

static __always_inline struct settings *get_settings(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&settings, &zero);
}

/* Whether a new flow is within what this CPU may make in a second. */
static __always_inline bool may_begin(const struct settings *settings)
{
	__u64 second = bpf_ktime_get_coarse_ns() / 1000000000ULL;
	__u32 zero = 0;
	struct rate *rate = bpf_map_lookup_elem(&rates, &zero);

	if (!settings->new_flows_per_second || !rate)
		return true;
	if (rate->second != second) {
		rate->second = second;
		rate->flows = 0;
	}
	if (rate->flows >= settings->new_flows_per_second)
		return false;
	rate->flows++;
	return true;
}

static __always_inline __u32 mixed(__u32 hash, __u32 word)
{
	word *= 0xcc9e2d51;
	word = word << 15 | word >> 17;
	hash ^= word * 0x1b873593;
	hash = hash << 13 | hash >> 19;
	return hash * 5 + 0xe6546b64;
}

/* Of a client: of its address, or of its address and port. */
static __always_inline __u32 hash_of(const struct tuple *tuple, bool by_address, __u32 seed)
{
	__u32 hash = seed;

	for (int i = 0; i < 4; i++)
		hash = mixed(hash, tuple->source.words[i]);
	if (!by_address)
		hash = mixed(hash, (__u32)tuple->source_port << 16 | tuple->protocol);
	hash ^= hash >> 16;
	hash *= 0x85ebca6b;
	hash ^= hash >> 13;
	hash *= 0xc2b2ae35;
	return hash ^ hash >> 16;
}

/* The number of the backend that the table has for a hash; 0 if there is none. */
static __always_inline __u32 drawn_backend(const struct vip *vip, __u32 hash)
{
	__u32 number = vip->number, *backend, slot;
	void *table = bpf_map_lookup_elem(&tables, &number);

	if (!table || !vip->table_size)
		return 0;
	slot = hash % vip->table_size;
	backend = bpf_map_lookup_elem(table, &slot);
	return backend ? *backend : 0;
}

static __always_inline struct backend *living_backend(__u32 number)
{
	struct backend *backend = bpf_map_lookup_elem(&backends, &number);

	return number && backend && backend->flags & BACKEND_ALIVE ? backend : NULL;
}

static __always_inline bool is_denied(const struct packet *packet)
{
	if (packet->is_v6) {
		struct prefix6 key = { .length = 128 };

		__builtin_memcpy(key.bytes, &packet->tuple.source, sizeof(key.bytes));
		return bpf_map_lookup_elem(&denied6, &key);
	} else {
		struct prefix4 key = { .length = 32 };

		__builtin_memcpy(key.bytes, &packet->tuple.source.words[3], sizeof(key.bytes));
		return bpf_map_lookup_elem(&denied4, &key);
	}
}

static __always_inline bool begins(const struct packet *packet)
{
	return packet->protocol == IPPROTO_UDP ||
	       (packet->tcp_flags & (TCP_SYN | TCP_ACK | TCP_RST | TCP_FIN)) == TCP_SYN;
}

/* Note, in both directions, that one of them is at its end. */
static __noinline int note_end(struct work *work, const struct packet *packet, struct flow *flow)
{
	bool is_reset = packet->tcp_flags & TCP_RST;
	struct flow *other;

	flow->flags |= is_reset ? FLOW_RST : FLOW_FIN;
	if (flow->forwarding != FORWARD_NAT) {
		/* The other direction does not come by here; it has not long to live either. */
		flow->flags |= FLOW_TWIN_FIN;
		return 0;
	}
	turn(&work->twin, &flow->to);
	other = find(&work->twin, packet->is_v6);
	if (other)
		other->flags |= is_reset ? FLOW_RST : FLOW_TWIN_FIN;
	return 0;
}

/* Note what a packet says of its flow. */
static __always_inline void note(struct work *work, const struct packet *packet, struct flow *flow, __u64 now)
{
	if (now - flow->seen_ns > SEEN_NS)
		flow->seen_ns = now;
	if (packet->protocol == IPPROTO_TCP && packet->tcp_flags & (TCP_FIN | TCP_RST))
		note_end(work, packet, flow);
}

/* A client that goes on is one: its flow takes its place among the others. False if half of it is lost already. */
static __noinline bool establish(struct work *work, const struct packet *packet, const struct flow *flow)
{
	struct flow *other = NULL;

	work->flow = *flow;
	work->flow.flags &= ~FLOW_OPENING;
	if (flow->forwarding == FORWARD_NAT) {
		turn(&work->twin, &flow->to);
		other = find_in(&work->twin, packet->is_v6, true);
		if (other) {
			work->answers = *other;
			work->answers.flags &= ~FLOW_OPENING;
			put(&work->twin, &work->answers, packet->is_v6, false);
			forget_in(&work->twin, packet->is_v6, true);
		} else if (!find_in(&work->twin, packet->is_v6, false)) {
			return false;
		} /* else another CPU is at it */
	}
	put(&packet->tuple, &work->flow, packet->is_v6, false);
	forget_in(&packet->tuple, packet->is_v6, true);
	/* As in `begin`: the second entry's room may have been the first one's. */
	if (other && !find_in(&work->twin, packet->is_v6, false))
		put(&work->twin, &work->answers, packet->is_v6, false);
	return true;
}

/* The entry for the answers of `work->flow` in `nat`, on a port of ours that is free. `work->flow.to` is complete
 * then, and `work->twin` is that entry's key. */
static __always_inline bool take_port(struct work *work, const struct packet *packet, const struct settings *settings)
{
	__u32 ports = settings->last_port - settings->first_port + 1;
	__u32 hash = hash_of(&packet->tuple, false, settings->seed ^ 0x9e3779b9);

	work->answers = work->flow;
	work->answers.direction = TO_CLIENT;
	work->answers.hop.until_ns = 0;
	turn(&work->answers.to, &packet->tuple);
	turn(&work->twin, &work->flow.to);
	for (int i = 0; i < PORTS_TRIED; i++) {
		work->twin.destination_port = bpf_htons(settings->first_port + (hash + i * PORT_STEP) % ports);
		if (!find_in(&work->twin, packet->is_v6, false) &&
		    !put(&work->twin, &work->answers, packet->is_v6, true)) {
			work->flow.to.source_port = work->twin.destination_port;
			return true;
		}
	}
	return false;
}

/* Remember where a flow goes, whose `to` is in `work->flow`: UNDERSTOOD, or the reason why it cannot be. */
static __always_inline int begin(struct work *work, const struct packet *packet, const struct settings *settings,
				 const struct way *way, __u32 generation, __u8 flags)
{
	struct flow *flow = &work->flow;
	struct backend_count *of_backend;
	struct vip_count *of_vip;

	flow->seen_ns = bpf_ktime_get_coarse_ns();
	flow->hop = *way->hop;
	flow->vip = way->vip;
	flow->backend = way->number;
	flow->generation = generation;
	flow->direction = TO_BACKEND;
	flow->flags = flags | FLOW_OPENING;
	flow->forwarding = way->forwarding;
	if (way->forwarding == FORWARD_NAT && !take_port(work, packet, settings))
		return PASS_NO_PORT;
	if (put(&packet->tuple, flow, packet->is_v6, true)) {
		/* Another CPU was faster. What it chose holds; the client sends this packet again. */
		if (way->forwarding == FORWARD_NAT)
			forget_in(&work->twin, packet->is_v6, true);
		return DROP_RACE;
	}
	/* Where the table is full, making room for the second entry may have taken the first one's: whatever has not
	 * been looked at yet goes first. Looking at it is what keeps it until the answer comes. */
	if (way->forwarding == FORWARD_NAT && !find_in(&work->twin, packet->is_v6, true))
		put(&work->twin, &work->answers, packet->is_v6, true);
	of_vip = vip_count(way->vip);
	if (of_vip)
		of_vip->flows++;
	of_backend = backend_count(way->number);
	if (of_backend)
		of_backend->flows++;
	return UNDERSTOOD;
}

#endif
