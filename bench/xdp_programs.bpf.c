/* SPDX-License-Identifier: GPL-3.0-only
 *
 * What the bench of the data plane has beside it: a source of frames, their end, and the least that a program
 * can do which sends them back.
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define HEAD_BYTES 80

struct template {
	__u8 head[HEAD_BYTES]; /* every frame begins so */
	__u32 flows;	       /* source ports that they have in turn */
	__u16 first_port;
	__u16 port_at; /* where the source port is in the head */
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct template);
} templates SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 2); /* frames made, frames that came to their end */
	__type(key, __u32);
	__type(value, __u64);
} frames SEC(".maps");

/* Frames are used again after what the others have made of them: their heads are written anew. */
SEC("xdp") int generate(struct xdp_md *ctx)
{
	__u8 *data = (__u8 *)(long)ctx->data, *end = (__u8 *)(long)ctx->data_end;
	__u32 at = 0;
	struct template *template = bpf_map_lookup_elem(&templates, &at);
	__u64 *made = bpf_map_lookup_elem(&frames, &at);

	if (!template || !made || !template->flows || data + HEAD_BYTES > end)
		return XDP_ABORTED;
	__builtin_memcpy(data, template->head, HEAD_BYTES);
	__u32 port_at = template->port_at & 127;
	__u16 port = template->first_port + (__u32)*made % template->flows;
	if (data + port_at + 2 > end)
		return XDP_ABORTED;
	*(__be16 *)(data + port_at) = bpf_htons(port);
	*made += 1;
	return XDP_TX;
}

SEC("xdp") int finish(struct xdp_md *ctx)
{
	__u32 at = 1;
	__u64 *came = bpf_map_lookup_elem(&frames, &at);

	if (came)
		*came += 1;
	return XDP_DROP;
}

/* For what has to reach the stack: XDP_TX at the other end wants a program at this one. */
SEC("xdp") int pass(struct xdp_md *ctx)
{
	return XDP_PASS;
}

/* XDP_TX, and nothing else: what a frame costs that is looked at and sent back. */
SEC("xdp") int turn(struct xdp_md *ctx)
{
	struct ethhdr *eth = (struct ethhdr *)(long)ctx->data;
	__u8 mac[ETH_ALEN];

	if ((void *)(eth + 1) > (void *)(long)ctx->data_end)
		return XDP_DROP;
	__builtin_memcpy(mac, eth->h_dest, ETH_ALEN);
	__builtin_memcpy(eth->h_dest, eth->h_source, ETH_ALEN);
	__builtin_memcpy(eth->h_source, mac, ETH_ALEN);
	return XDP_TX;
}

char _license[] SEC("license") = "GPL";
