/* SPDX-License-Identifier: GPL-3.0-only
 *
 * The Internet checksum, changed by what changed in the data (RFC 1624).
 */
#ifndef CHECKSUM_H
#define CHECKSUM_H

#include <linux/types.h>

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

/* A sum of 16-bit words, as a checksum field has it. */
static __always_inline __u16 folded(__u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return ~sum;
}

/* How much a sum grows when one word of 32 bits becomes another. */
static __always_inline __u64 grown32(__u32 from, __u32 to)
{
	return (__u64)(__u32)~from + to;
}

static __always_inline __u64 grown16(__u16 from, __u16 to)
{
	return (__u64)(__u16)~from + to;
}

/* A checksum after its data has grown by so much. */
static __always_inline __u16 changed(__u16 check, __u64 growth)
{
	return folded((__u64)(__u16)~check + growth);
}

/* The same in UDP over IPv4: 0 says that there is no checksum, and a sum of 0 is sent as all ones (RFC 768). */
static __always_inline __u16 changed_udp(__u16 check, __u64 growth)
{
	if (!check)
		return 0;
	check = changed(check, growth);
	return check ? check : 0xffff;
}

#endif
