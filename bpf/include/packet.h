/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Copyright The podgate Authors */
/*
 * From bytes to a struct packet. The common shapes (TCP and UDP over IPv4
 * without options or IPv6 without extension headers) are read in place; every
 * other shape, and whatever is not in the linear part, goes through
 * parse_slow, which copies. Both give the same answer for the same packet.
 */
#pragma once

#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "types.h"

#define IP_MF 0x2000
#define IP_OFFSET 0x1fff
#define NEXTHDR_AUTH 51

/* RFC 792; <linux/icmp.h> drags in the C library. */
#define ICMP_ECHOREPLY 0
#define ICMP_DEST_UNREACH 3
#define ICMP_ECHO 8
#define ICMP_TIME_EXCEEDED 11
#define ICMP_PARAMETERPROB 12
/* RFC 4443 */
#define ICMPV6_ECHO_REQUEST 128
#define ICMPV6_ECHO_REPLY 129

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10

#define ICMPV6_MLD_FIRST 130
#define ICMPV6_MLD_LAST 132
#define ICMPV6_RS 133
#define ICMPV6_RA 134
#define ICMPV6_NS 135
#define ICMPV6_NA 136
#define ICMPV6_REDIRECT 137
#define ICMPV6_MLD2 143

#define EXTENSIONS_MAX 8

/* What a packet is, and so how it is judged. */
enum shape {
	SHAPE_FLOW,  /* has a key: conntrack, then policy */
	SHAPE_ERROR, /* ICMP error: related if inner has a flow, else policy */
	SHAPE_STATELESS, /* policy for each packet */
	SHAPE_FRAGMENT,  /* later fragment: key lacks the ports */
	SHAPE_NEIGHBOUR, /* ARP, ND, MLD: passes, less what spoofs */
	SHAPE_ALIEN,     /* not IP */
	SHAPE_BAD,       /* dropped for reason */
};

struct packet {
	struct flow_key key;
	__u32 l3; /* offsets in the frame */
	__u32 l4;
	__u32 fragment_id;
	__u16 ethertype;
	__u8 shape;
	__u8 reason; /* of SHAPE_BAD */
	__u8 tcp_flags;
	__u8 icmp_type;
	__u8 icmp_code;
	__u8 fragment; /* first or later */
	__u8 first_fragment;
	__u8 hop_limit;
};

/* What a judgement comes to, and why. */
struct judgement {
	__u32 rule;
	__u32 ruleset;
	__u32 class;
	__u16 owner;
	__u8 action;
	__u8 reason;
};

/*
 * A verdict that this CPU gave lately. It stands for as long as that of a
 * flow: the epoch is the same, and the ruleset has its number.
 */
struct judged {
	struct address peer;
	__u32 at; /* kind << 24 | coordinate << 1 | direction */
	__u32 epoch;
	struct judgement answer; /* ruleset 0: none */
};

#define JUDGED 64

/*
 * The packet at hand, once it left the fast path. Functions below the hooks
 * are global, so that each is verified once and not for every path to it; the
 * oldest kernel lets such functions take scalars only, so the rest waits here.
 * But for the last group, nothing outlives the packet.
 */
struct scratch {
	struct packet packet;
	struct packet quoted; /* what an ICMP error is about */
	struct judgement judgement;
	struct frontend_key frontend; /* to be looked up */
	struct block_key block;
	struct flow
		flow; /* to be entered: the stack is 512 bytes for all frames */

	__u64 tick; /* jiffies when this CPU last asked a clock for a drop */
	__u64 tick_ns;
	__u64 dropped; /* identity of this CPU's last drop in that tick */
	__u32 records; /* this CPU put into the ring */
	struct judged judged[JUDGED];
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct scratch);
} scratches SEC(".maps");

static __always_inline struct scratch *scratch_get(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&scratches, &zero);
}

static __always_inline void address_v4(struct address *a, __be32 v4)
{
	__u64 *w = (__u64 *)a;

	w[0] = 0;
	w[1] = (__u64)v4 << 32 | 0xffff0000ULL;
}

static __always_inline void address_copy(struct address *to,
					 const struct address *from)
{
	const __u64 *f = (const __u64 *)from;
	__u64 *t = (__u64 *)to;

	t[0] = f[0];
	t[1] = f[1];
}

static __always_inline bool address_equal(const struct address *a,
					  const struct address *b)
{
	const __u64 *x = (const __u64 *)a, *y = (const __u64 *)b;

	return x[0] == y[0] && x[1] == y[1];
}

/* Is it ::ffff:0:0/96? Such an address means IPv4 and is never on the wire. */
static __always_inline bool address_is_v4(const struct address *a)
{
	const __u64 *w = (const __u64 *)a;

	return w[0] == 0 && (__u32)w[1] == 0xffff0000;
}

static __always_inline bool address_is_zero(const struct address *a)
{
	const __u64 *w = (const __u64 *)a;

	return w[0] == 0 && w[1] == 0;
}

/* The end of a packet that is the pod's: source of egress, target of ingress. */
static __always_inline void packet_addresses(struct packet *p, __u32 dir,
					     const struct address *source,
					     const struct address *destination)
{
	bool egress = dir == DIRECTION_EGRESS;

	address_copy(&p->key.local, egress ? source : destination);
	address_copy(&p->key.peer, egress ? destination : source);
}

/*
 * The words of a key beside its addresses, in whole stores: the CPU forwards
 * no load that spans several smaller ones, and hashes read words.
 */
static __always_inline void key_words(struct flow_key *key, __u32 endpoint,
				      __u16 local_port, __u16 peer_port,
				      __u8 protocol)
{
	__u64 *w = (__u64 *)key;

	w[0] = endpoint | (__u64)local_port << 32 | (__u64)peer_port << 48;
	w[5] = protocol;
}

static __always_inline void packet_ports(struct packet *p, __u32 dir,
					 __u16 source, __u16 destination)
{
	bool egress = dir == DIRECTION_EGRESS;

	p->key.local_port = egress ? source : destination;
	p->key.peer_port = egress ? destination : source;
}

/*
 * Reads the common shapes without a copy: key, ethertype and TCP flags; the
 * rest of *p is undefined. Returns false for every other shape.
 */
static __always_inline bool parse_fast(struct __sk_buff *skb, __u32 dir,
				       __u32 endpoint, struct packet *p)
{
	void *data = (void *)(long)skb->data;
	void *end = (void *)(long)skb->data_end;
	bool egress = dir == DIRECTION_EGRESS;
	struct ethhdr *eth = data;
	__u16 source_port, destination_port;
	__u8 protocol;
	__u8 *l4;

	if (data + ETH_HLEN + sizeof(struct iphdr) + 8 > end)
		return false;
	if (eth->h_proto == bpf_htons(ETH_P_IP)) {
		struct iphdr *ip = data + ETH_HLEN;
		struct address source, destination;

		if (*(__u8 *)ip != 0x45 ||
		    (ip->frag_off & bpf_htons(IP_MF | IP_OFFSET)))
			return false;
		if (bpf_ntohs(ip->tot_len) < sizeof(*ip) + 8 ||
		    bpf_ntohs(ip->tot_len) > skb->len - ETH_HLEN)
			return false;
		address_v4(&source, ip->saddr);
		address_v4(&destination, ip->daddr);
		packet_addresses(p, dir, &source, &destination);
		protocol = ip->protocol;
		l4 = (void *)(ip + 1);
		if (ip->protocol == IPPROTO_TCP &&
		    bpf_ntohs(ip->tot_len) < sizeof(*ip) + 20)
			return false;
	} else if (eth->h_proto == bpf_htons(ETH_P_IPV6)) {
		struct ipv6hdr *ip = data + ETH_HLEN;
		struct address *source, *destination;

		if ((void *)(ip + 1) + 8 > end)
			return false;
		if (*(__u8 *)ip >> 4 != 6)
			return false;
		if (bpf_ntohs(ip->payload_len) < 8 ||
		    bpf_ntohs(ip->payload_len) >
			    skb->len - ETH_HLEN - sizeof(*ip))
			return false;
		source = (struct address *)&ip->saddr;
		destination = (struct address *)&ip->daddr;
		/* Unaligned: the frame starts 2 bytes off, for both families. */
		packet_addresses(p, dir, source, destination);
		if (address_is_v4(&p->key.local) || address_is_v4(&p->key.peer))
			return false;
		protocol = ip->nexthdr;
		l4 = (void *)(ip + 1);
		if (ip->nexthdr == IPPROTO_TCP &&
		    bpf_ntohs(ip->payload_len) < 20)
			return false;
	} else {
		return false;
	}

	if (protocol == IPPROTO_TCP) {
		if (l4 + 20 > (__u8 *)end)
			return false;
		p->tcp_flags = l4[13];
	} else if (protocol == IPPROTO_UDP) {
		p->tcp_flags = 0;
	} else {
		return false;
	}
	source_port = bpf_ntohs(*(__be16 *)l4);
	destination_port = bpf_ntohs(*(__be16 *)(l4 + 2));
	key_words(&p->key, endpoint, egress ? source_port : destination_port,
		  egress ? destination_port : source_port, protocol);
	p->ethertype = bpf_ntohs(eth->h_proto);
	return true;
}

/* Puts what parse_fast has read where functions that judge it look. */
static __always_inline void packet_keep(struct packet *to,
					const struct packet *p)
{
	to->key = p->key;
	to->ethertype = p->ethertype;
	to->shape = SHAPE_FLOW;
	to->tcp_flags = p->tcp_flags;
	to->icmp_type = 0;
	to->icmp_code = 0;
	to->fragment = 0;
	to->first_fragment = 0;
}

static __always_inline int bad(struct packet *p, __u8 reason)
{
	p->shape = SHAPE_BAD;
	p->reason = reason;
	return SHAPE_BAD;
}

/*
 * Ports, echo identifiers and flags at p->l4. room is what the IP header says
 * is left for the upper layer.
 */
__noinline int parse_upper(struct __sk_buff *skb, __u32 dir, __u32 room)
{
	struct scratch *s = scratch_get();
	struct packet *p;
	__u8 protocol;
	__u8 h[14] = {};
	__u16 source, destination;

	if (!s)
		return SHAPE_BAD;
	p = &s->packet;
	protocol = p->key.protocol;

	if (protocol == IPPROTO_TCP) {
		if (room < 20 || bpf_skb_load_bytes(skb, p->l4, h, 14))
			return bad(p, REASON_MALFORMED);
		p->tcp_flags = h[13];
	} else if (protocol == IPPROTO_UDP) {
		if (room < 8 || bpf_skb_load_bytes(skb, p->l4, h, 8))
			return bad(p, REASON_MALFORMED);
	} else if (protocol == IPPROTO_SCTP) {
		if (room < 12 || bpf_skb_load_bytes(skb, p->l4, h, 12))
			return bad(p, REASON_MALFORMED);
	} else if (protocol == IPPROTO_ICMP || protocol == IPPROTO_ICMPV6) {
		bool v6 = p->ethertype == ETH_P_IPV6;
		bool ask, answer;

		if (v6 != (protocol == IPPROTO_ICMPV6)) {
			return p->shape = SHAPE_STATELESS;
		}
		if (room < 8 || bpf_skb_load_bytes(skb, p->l4, h, 8))
			return bad(p, REASON_MALFORMED);
		p->icmp_type = h[0];
		p->icmp_code = h[1];
		ask = v6 ? h[0] == ICMPV6_ECHO_REQUEST : h[0] == ICMP_ECHO;
		answer =
			v6 ? h[0] == ICMPV6_ECHO_REPLY : h[0] == ICMP_ECHOREPLY;
		source = (__u16)h[4] << 8 | h[5];
		if (ask)
			packet_ports(p, dir, source, 0);
		else if (answer)
			packet_ports(p, dir, 0, source);
		else if (v6 && ((h[0] >= ICMPV6_MLD_FIRST &&
				 h[0] <= ICMPV6_REDIRECT) ||
				h[0] == ICMPV6_MLD2))
			p->shape = SHAPE_NEIGHBOUR;
		else if (v6 ? h[0] < ICMPV6_ECHO_REQUEST :
			      h[0] == ICMP_DEST_UNREACH ||
					 h[0] == ICMP_TIME_EXCEEDED ||
					 h[0] == ICMP_PARAMETERPROB)
			p->shape = SHAPE_ERROR;
		else
			p->shape = SHAPE_STATELESS;
		return p->shape;
	} else {
		return p->shape;
	}
	source = (__u16)h[0] << 8 | h[1];
	destination = (__u16)h[2] << 8 | h[3];
	packet_ports(p, dir, source, destination);
	return p->shape;
}

/* Does the IPv4 header at l3 carry a source route (RFC 791 3.1)? */
__noinline int source_routed(struct __sk_buff *skb, __u32 l3, __u32 header)
{
	__u32 at = sizeof(struct iphdr);
	__u8 option[2];

	for (int i = 0; i < 40; i++) {
		if (at >= header)
			return 0;
		if (bpf_skb_load_bytes(skb, l3 + at, option, 1))
			return -1;
		if (option[0] == IPOPT_EOL)
			return 0;
		if (option[0] == IPOPT_LSRR || option[0] == IPOPT_SSRR)
			return 1;
		if (option[0] == IPOPT_NOP) {
			at++;
			continue;
		}
		if (at + 2 > header ||
		    bpf_skb_load_bytes(skb, l3 + at, option, 2) ||
		    option[1] < 2)
			return -1;
		at += option[1];
	}
	return 0;
}

__noinline int parse_v4(struct __sk_buff *skb, __u32 dir)
{
	struct scratch *s = scratch_get();
	struct packet *p;
	struct address source, destination;
	struct iphdr ip;
	__u32 header, total;
	__u16 offset;

	if (!s)
		return SHAPE_BAD;
	p = &s->packet;
	if (bpf_skb_load_bytes(skb, p->l3, &ip, sizeof(ip)))
		return bad(p, REASON_MALFORMED);
	header = (*(__u8 *)&ip & 0xf) * 4;
	total = bpf_ntohs(ip.tot_len);
	/* A GSO packet above 64 KiB has no length ("BIG TCP"). */
	if (total == 0 && skb->gso_size)
		total = skb->len - p->l3;
	if (*(__u8 *)&ip >> 4 != 4 || header < sizeof(ip) || total < header ||
	    total > skb->len - p->l3)
		return bad(p, REASON_MALFORMED);
	address_v4(&source, ip.saddr);
	address_v4(&destination, ip.daddr);
	packet_addresses(p, dir, &source, &destination);
	p->key.protocol = ip.protocol;
	p->l4 = p->l3 + header;
	if (header > sizeof(ip)) {
		int routed = source_routed(skb, p->l3, header);

		if (routed)
			return bad(p, routed > 0 ? REASON_SOURCE_ROUTE :
						   REASON_MALFORMED);
	}
	offset = bpf_ntohs(ip.frag_off);
	p->fragment_id = bpf_ntohs(ip.id);
	p->fragment = !!(offset & (IP_MF | IP_OFFSET));
	if (offset & IP_OFFSET)
		return p->shape = SHAPE_FRAGMENT;
	parse_upper(skb, dir, total - header);
	if (offset & IP_MF) {
		p->first_fragment = 1;
		if (p->shape == SHAPE_BAD)
			p->reason = REASON_FRAGMENT;
	}
	return p->shape;
}

__noinline int parse_v6(struct __sk_buff *skb, __u32 dir)
{
	struct scratch *s = scratch_get();
	struct packet *p;
	/* Aligned so that its addresses can be read as words. */
	struct ipv6hdr ip __attribute__((aligned(8)));
	__u32 at, end, extensions = 0;
	__u8 next;

	if (!s)
		return SHAPE_BAD;
	p = &s->packet;
	if (bpf_skb_load_bytes(skb, p->l3, &ip, sizeof(ip)))
		return bad(p, REASON_MALFORMED);
	end = p->l3 + sizeof(ip) + bpf_ntohs(ip.payload_len);
	if (ip.payload_len == 0 && skb->gso_size)
		end = skb->len;
	if (*(__u8 *)&ip >> 4 != 6 || end > skb->len)
		return bad(p, REASON_MALFORMED);
	packet_addresses(p, dir, (struct address *)&ip.saddr,
			 (struct address *)&ip.daddr);
	if (address_is_v4(&p->key.local) || address_is_v4(&p->key.peer))
		return bad(p, REASON_MARTIAN);
	p->hop_limit = ip.hop_limit;
	at = p->l3 + sizeof(ip);
	next = ip.nexthdr;

	/*
	 * The test is at the end, so that the way back is a jump: up to 6.1 the
	 * verifier rejects a loop whose last instruction falls into its first.
	 */
	do {
		__u8 h[8] = {};
		__u16 offset;

		switch (next) {
		case IPPROTO_HOPOPTS:
		case IPPROTO_DSTOPTS:
		case IPPROTO_ROUTING:
		case IPPROTO_FRAGMENT:
		case NEXTHDR_AUTH:
			break;
		default:
			p->key.protocol = next;
			p->l4 = at;
			parse_upper(skb, dir, end - at);
			if (p->first_fragment && p->shape == SHAPE_BAD)
				p->reason = REASON_FRAGMENT;
			return p->shape;
		}
		if (extensions++ == EXTENSIONS_MAX)
			return bad(p, REASON_EXTENSIONS);
		if (at + 8 > end || bpf_skb_load_bytes(skb, at, h, 8))
			return bad(p, REASON_MALFORMED);
		if (next == IPPROTO_FRAGMENT) {
			offset = (__u16)h[2] << 8 | h[3];
			p->fragment = 1;
			p->fragment_id = (__u32)h[4] << 24 | (__u32)h[5] << 16 |
					 (__u32)h[6] << 8 | h[7];
			if (offset & 0xfff8) {
				/*
				 * Extension headers may stand before the upper
				 * layer only in the first fragment, so what a
				 * later one holds is known by id alone.
				 */
				p->key.protocol = h[0];
				return p->shape = SHAPE_FRAGMENT;
			}
			p->first_fragment = offset & 1;
			at += 8;
		} else if (next == NEXTHDR_AUTH) {
			at += ((__u32)h[1] + 2) * 4;
		} else {
			/* Segments left: the destination is another. */
			if (next == IPPROTO_ROUTING && h[3])
				return bad(p, REASON_SOURCE_ROUTE);
			at += ((__u32)h[1] + 1) * 8;
		}
		next = h[0];
	} while (at <= end);
	return bad(p, REASON_MALFORMED);
}

/*
 * Reads any shape into scratch->packet. The result is its shape.
 */
__noinline int parse_slow(struct __sk_buff *skb, __u32 dir)
{
	struct scratch *s = scratch_get();
	struct packet *p;
	__be16 type;

	if (!s)
		return SHAPE_BAD;
	p = &s->packet;
	__builtin_memset(p, 0, sizeof(*p));
	p->l3 = ETH_HLEN;
	if (bpf_skb_load_bytes(skb, ETH_HLEN - 2, &type, 2))
		return bad(p, REASON_MALFORMED);
	/* Tags in the frame: QinQ, or one that the device did not take out. */
	for (int i = 0; i < 2; i++) {
		if (type != bpf_htons(ETH_P_8021Q) &&
		    type != bpf_htons(ETH_P_8021AD))
			break;
		if (bpf_skb_load_bytes(skb, p->l3 + 2, &type, 2))
			return bad(p, REASON_MALFORMED);
		p->l3 += 4;
	}
	p->ethertype = bpf_ntohs(type);
	switch (p->ethertype) {
	case ETH_P_IP:
		return parse_v4(skb, dir);
	case ETH_P_IPV6:
		return parse_v6(skb, dir);
	case ETH_P_ARP:
		return p->shape = SHAPE_NEIGHBOUR;
	}
	return p->shape = SHAPE_ALIEN;
}
