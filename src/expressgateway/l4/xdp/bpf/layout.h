/* SPDX-License-Identifier: GPL-3.0-only
 *
 * What the program and its loader share: keys, values and numbers of every map. `layout.py` has the same in
 * Python, and is checked against this file's BTF when an object is loaded.
 *
 * Addresses are IPv6 addresses of 16 bytes; IPv4 ones are mapped into ::ffff:0:0/96 (RFC 4291 2.5.5.2).
 * Addresses and ports are in network byte order, everything else in the host's. Times are nanoseconds of
 * CLOCK_MONOTONIC.
 */
#ifndef LAYOUT_H
#define LAYOUT_H

#include <linux/types.h>

/* Raised when a map changes its meaning: pinned maps of another layout are not taken over. */
#define LAYOUT_VERSION 1

/* Numbers of VIPs and backends begin with 1: 0 is nobody. */
#ifndef MAX_VIPS
#define MAX_VIPS 256
#endif
#ifndef MAX_BACKENDS
#define MAX_BACKENDS 8192
#endif
#ifndef MAX_PORTS
#define MAX_PORTS 256
#endif
#ifndef MAX_DENIED
#define MAX_DENIED 65536
#endif
#ifndef MAX_SERVER_IDS
#define MAX_SERVER_IDS 8192
#endif
#ifndef MAX_FLOW_ENTRIES
#define MAX_FLOW_ENTRIES 131072 /* set before loading: two for a flow in `nat`, one in `dsr` */
#endif
#ifndef MAX_OPENING_ENTRIES
#define MAX_OPENING_ENTRIES 32768 /* likewise */
#endif

struct address {
	__be32 words[4];
};

/* A packet's transport addresses, as it comes in. The key of a flow over IPv6. */
struct tuple {
	struct address source;
	struct address destination;
	__be16 source_port;
	__be16 destination_port;
	__u8 protocol; /* IPPROTO_TCP or IPPROTO_UDP */
	__u8 zero;
	__u16 backend; /* 0, but where a client has several QUIC connections on one port, and a server ID says that
			* this one is somebody else's than the flow without it */
};

/* The same of IPv4 alone: the key of a flow over IPv4 is short, for the hash over it is a good part of a packet's
 * cost. */
struct tuple4 {
	__be32 source;
	__be32 destination;
	__be16 source_port;
	__be16 destination_port;
	__u8 protocol;
	__u8 zero;
	__u16 backend;
};

/* -- VIPs: hash `vips`, of `struct vip_key` */

struct vip_key {
	struct address address;
	__be16 port;
	__u8 protocol;
	__u8 zero;
};

enum forwarding {
	FORWARD_NAT = 1,	  /* both addresses are rewritten, answers come back through us */
	FORWARD_DSR = 2,	  /* another destination MAC, nothing else but the TTL: backends on the link */
	FORWARD_DSR_ENCAPSULATED = 3, /* IP in IP: IPv4 in IPv4, IPv6 in IPv6 */
};

enum vip_flag {
	VIP_BY_ADDRESS = 1, /* a client's address alone decides about its backend, not its port */
	VIP_SERVER_IDS = 2, /* QUIC whose connection IDs carry a server ID in the clear; see `server_ids` */
};

struct vip {
	__u32 number;	  /* in `tables`, `vip_counts` */
	__u32 table_size; /* entries of its table */
	__u8 forwarding;
	__u8 flags;
	__u8 config_id;		/* VIP_SERVER_IDS: the first three bits of connection IDs */
	__u8 server_id_length; /* VIP_SERVER_IDS: 1 to 15 bytes */
	__u32 zero;
};

/* -- Tables: array of arrays `tables`, by the VIP's number; each is an array of backends' numbers (__u32). */

/* -- Backends: array `backends` */

enum backend_flag {
	BACKEND_ALIVE = 1, /* its flows go on; whether it gets new ones is for the table to say */
};

struct backend {
	struct address address;
	struct address source; /* ours, towards it: for `nat` and for the outer header of an encapsulation */
	__be16 port;
	__u8 flags;
	__u8 zero;
	__u32 generation; /* another one for each backend that has had this number; never 0 */
};

/* -- Flows: LRU hashes `flows4`, of `struct tuple4`, and `flows6`, of `struct tuple`. In `nat` a flow has two entries, one for each
 * direction; `to` of one, turned around, is the key of the other. In `dsr` it has one, and `to` is nothing.
 *
 * A flow begins in `opening4` or `opening6`, which are like them, and moves with the next packet of its client: a flood
 * of first packets pushes out what the flood has made, and nothing else. */

enum direction {
	TO_BACKEND = 1,
	TO_CLIENT = 2,
};

enum flow_flag {
	FLOW_OPENING = 1,     /* only its first packet has come, or the same SYN again; it is in `opening4` or `opening6` */
	FLOW_FIN = 2,	      /* TCP: this direction has ended */
	FLOW_TWIN_FIN = 4,    /* TCP: the other one has */
	FLOW_RST = 8,	      /* TCP: either has reset it */
	FLOW_SERVER_IDS = 16, /* of a VIP with VIP_SERVER_IDS */
};

/* Where packets leave, as the kernel said not long ago: what bpf_fib_lookup finds, without asking each time. */
struct hop {
	__u64 until_ns; /* then it is asked again */
	__u32 ifindex;	/* of the device */
	__u32 mtu;
	__u16 vlan;	       /* 0: none */
	__u8 destination[6]; /* MAC addresses */
	__u8 source[6];
	__u16 zero;
};

struct flow {
	struct tuple to; /* what its packets become: in `nat` */
	__u64 seen_ns;	 /* last packet in this direction */
	struct hop hop;
	__u32 vip;
	__u32 backend;
	__u32 generation; /* the backend's */
	__u8 direction;
	__u8 flags;
	__u8 forwarding; /* the VIP's, when the flow began */
	__u8 zero;
};

/* -- Server IDs: hash `server_ids` -> a backend's number (__u32) */

struct server_id {
	__u32 vip;
	__u8 bytes[16]; /* the rest is zero */
};

/* -- Ports, the places where frames leave: hash `ports`, by the ifindex that a route names (__u32). A VLAN device
 * is the port below it, with a tag. */

struct port {
	__u32 ifindex; /* of the device itself */
	__u16 vlan;    /* 0: none */
	__u8 mac[6];   /* of the device; only frames to it are ours */
};

/* -- Denied sources: LPM tries `denied4` and `denied6` -> __u8 (1) */

struct prefix4 {
	__u32 length; /* bits */
	__u8 bytes[4];
};

struct prefix6 {
	__u32 length; /* bits */
	__u8 bytes[16];
};

/* -- Settings: array `settings` of one */

struct settings {
	__u64 tcp_idle_ns;
	__u64 udp_idle_ns;
	__u64 closing_ns; /* after FIN in both directions, after RST, and after a SYN that nothing follows */
	__u32 new_flows_per_second; /* on each CPU; 0: no limit */
	__u16 first_port; /* of those that are given to flows in `nat`; host byte order */
	__u16 last_port;
	__u32 seed; /* of the hash that spreads flows */
	__u32 denies; /* whether there is anything in `denied4` and `denied6` */
};

/* -- Counts: per-CPU array `vip_counts` by VIP (0: packets that belong to none), `backend_counts` by backend */

enum action {
	ACTION_PASS = 0,
	ACTION_DROP = 1,
};

enum reason {
	/* Packets that are left to the kernel's stack. */
	PASS_FRAGMENT = 0,
	PASS_MALFORMED,	      /* a header that is cut off, or contradicts itself */
	PASS_NOT_UNDERSTOOD,  /* extension headers, protocols and ICMP that are not our business */
	PASS_NO_FLOW,	      /* TCP in the middle of a connection that is not known, in `nat` */
	PASS_OVER_CAP,	      /* a new flow above `new_flows_per_second`, in `nat` */
	PASS_NO_BACKEND,      /* the table is empty */
	PASS_NO_PORT,	      /* every port that was tried is taken */
	PASS_NO_ROUTE,	      /* of a new flow: no next hop, or none that has been resolved */
	/* Packets that end here. */
	DROP_DENIED,
	DROP_TTL,
	DROP_NO_NEIGHBOUR,    /* of a known flow: the next hop's MAC is not known */
	DROP_NO_ROUTE,	      /* of a known flow */
	DROP_NO_PORT,	      /* it would leave by a device that is not in `ports` */
	DROP_NOT_ADJACENT,    /* `dsr`: the backend is not on the link */
	DROP_TOO_BIG,	      /* and may not be told of: IPv4 without DF */
	DROP_NO_SPACE,	      /* a header does not fit in front of it */
	DROP_RACE,	      /* another packet of the same new flow was faster */
	REASON_COUNT,
};
#define FIRST_DROP DROP_DENIED

struct vip_count {
	__u64 in_packets;  /* sent to a backend */
	__u64 in_bytes;	   /* of the IP packet as it came */
	__u64 out_packets; /* sent to a client, in `nat` */
	__u64 out_bytes;
	__u64 flows;	   /* made */
	__u64 stateless;   /* packets sent by the table alone: `dsr` above the cap or without a flow */
	__u64 icmp_followed;
	__u64 icmp_too_big; /* "fragmentation needed" and "packet too big" that we sent */
	__u64 reasons[REASON_COUNT];
};

struct backend_count {
	__u64 in_packets;
	__u64 in_bytes;
	__u64 out_packets;
	__u64 out_bytes;
	__u64 flows;
};

/* Per-CPU array `rates` of one: what `new_flows_per_second` is held to. */
struct rate {
	__u64 second; /* of the clock */
	__u64 flows;
};

/* The enums that members of one byte are of: an object tells only of types that something has. */
struct numbers {
	enum forwarding forwarding;
	enum vip_flag vip_flag;
	enum backend_flag backend_flag;
	enum direction direction;
	enum flow_flag flow_flag;
	enum action action;
	enum reason reason;
};

/* -- The context of the program `sweep`, which removes flows that have ended and counts the others. */
struct sweep {
	__u64 flows4;	/* entries to backends that are left */
	__u64 flows6;
	__u64 opening;	/* of them, those whose first packet was the last */
	__u64 entries;	/* both directions */
	__u64 removed;	/* flows, by this sweep */
	struct numbers numbers[0];
};

#endif
