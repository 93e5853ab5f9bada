/* SPDX-License-Identifier: GPL-3.0-only
 *
 * Server IDs in the clear, in the connection IDs of QUIC (draft-ietf-quic-load-balancers-21 3 and 4; the public
 * header is RFC 8999's). Whose a connection is can so be told without having seen it before.
 */
#ifndef QUIC_H
#define QUIC_H

#include "packet.h"

#define QUIC_LONG 0x80
#define MIN_NONCE 4
#define MAX_PLAINTEXT 19
#define MAX_SERVER_ID 15

/* The backend that a datagram's connection ID names; 0 if it names none. */
static __always_inline __u32 named_backend(struct xdp_md *ctx, const struct packet *packet, const struct vip *vip)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	__u8 *quic = data + (packet->transport & MAX_OFFSET) + sizeof(struct udphdr);
	struct server_id key = { .vip = vip->number };
	__u32 size, *backend;
	__u8 *cid;

	if ((void *)(quic + 6) > end)
		return 0;
	cid = quic + (quic[0] & QUIC_LONG ? 6 : 1);
	if ((void *)(cid + 1 + MAX_SERVER_ID) > end)
		return 0;
	size = cid[0] & 0x1f;
	if (cid[0] >> 5 != vip->config_id || size < vip->server_id_length + MIN_NONCE || size > MAX_PLAINTEXT)
		return 0;
	if (quic[0] & QUIC_LONG && quic[5] != 1 + size)
		return 0;
#pragma unroll
	for (int i = 0; i < MAX_SERVER_ID; i++)
		if (i < vip->server_id_length)
			key.bytes[i] = cid[1 + i];
	backend = bpf_map_lookup_elem(&server_ids, &key);
	return backend ? *backend : 0;
}

#endif
