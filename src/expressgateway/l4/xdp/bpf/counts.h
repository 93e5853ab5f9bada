/* SPDX-License-Identifier: GPL-3.0-only
 *
 * Counting, each CPU for itself, and what a packet's fate is called.
 */
#ifndef COUNTS_H
#define COUNTS_H

#include "maps.h"

/* Of a VIP's number; 0 for what belongs to none. */
static __always_inline struct vip_count *vip_count(__u32 vip)
{
	return bpf_map_lookup_elem(&vip_counts, &vip);
}

static __always_inline struct backend_count *backend_count(__u32 backend)
{
	return bpf_map_lookup_elem(&backend_counts, &backend);
}

/* Have done with a packet that is not sent on: the verdict that goes with the reason. */
static __always_inline int ended(__u32 vip, __u32 reason)
{
	struct vip_count *count = vip_count(vip);

	if (count && reason < REASON_COUNT)
		count->reasons[reason]++;
	return reason >= FIRST_DROP ? XDP_DROP : XDP_PASS;
}

#endif
