/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Copyright The podgate Authors */
/*
 * ARP, neighbour discovery and listener reports of a pod whose egress policy
 * isolates: they pass, but must not be a way around it. What a router would
 * forward passes only to who is on the link for sure, and nothing carries more
 * than it has to.
 */
#pragma once

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "conntrack.h"
#include "gate.h"
#include "maps.h"
#include "packet.h"

#define ETHER_MIN 46 /* bytes that the shortest Ethernet frame carries */
#define ND_HEADER 8
#define ND_OPTION 8
/* A link-layer address and a nonce (RFC 7527 4.1). */
#define ND_OPTIONS_MAX (2 * ND_OPTION)
/* Hop-by-hop options that hold no more than a router alert (RFC 2711). */
#define ROUTER_ALERT 8

static __always_inline bool is_multicast(const struct address *a)
{
	return a->bytes[0] == 0xff;
}

/* fe80::/10: routers do not forward to it. */
static __always_inline bool is_link_local(const struct address *a)
{
	return a->bytes[0] == 0xfe && (a->bytes[1] & 0xc0) == 0x80;
}

/* ff02::1 (RFC 4291 2.7.1). */
static __always_inline bool is_all_nodes(const struct address *a)
{
	const __u64 *w = (const __u64 *)a;

	return w[0] == bpf_cpu_to_be64(0xff02000000000000ULL) &&
	       w[1] == bpf_cpu_to_be64(1);
}

/* ff02::1:ff00:0/104 and the end of the target (RFC 4291 2.7.1). */
static __always_inline bool is_solicited_node(const struct address *a,
					      const struct address *target)
{
	const __u64 *w = (const __u64 *)a, *t = (const __u64 *)target;

	return w[0] == bpf_cpu_to_be64(0xff02000000000000ULL) &&
	       w[1] == (bpf_cpu_to_be64(0x00000001ff000000ULL) |
			(t[1] & bpf_cpu_to_be64(0xffffffULL)));
}

static __always_inline __u64 neighbour_identity(const struct neighbour_key *key)
{
	const __u64 *w = (const __u64 *)key;

	return w[0] * 0x9e3779b97f4a7c15ULL + w[1] * 0xbf58476d1ce4e5b9ULL +
	       w[2] * 0x94d049bb133111ebULL;
}

/*
 * Neighbour discovery in scratch has come to the pod with a hop limit of 255,
 * so from its link: the pod may answer, and later ask whether it is there.
 */
__noinline int meet_neighbour(struct __sk_buff *skb, __u32 endpoint)
{
	struct neighbour_key key = { .endpoint = endpoint };
	struct scratch *s = scratch_get();
	struct neighbour value;
	struct packet *p;

	if (!s)
		return 0;
	p = &s->packet;
	if (p->ethertype != ETH_P_IPV6)
		return 0;
	/* Who asks is answered; who is asked for is who advertises it. */
	if (p->icmp_type == ICMPV6_NA) {
		if (bpf_skb_load_bytes(skb, p->l4 + ND_HEADER, &key.address,
				       sizeof(key.address)))
			return 0;
	} else if (p->icmp_type == ICMPV6_NS || p->icmp_type == ICMPV6_RA) {
		address_copy(&key.address, &p->key.peer);
	} else {
		return 0;
	}
	value.identity = neighbour_identity(&key);
	value.expires = bpf_jiffies64() + neighbour_timeout;
	return bpf_map_update_elem(&neighbours, &key, &value, BPF_ANY);
}

static __always_inline bool is_neighbour(__u32 endpoint,
					 const struct address *a)
{
	struct neighbour_key key = { .endpoint = endpoint };
	struct neighbour *n;

	address_copy(&key.address, a);
	n = bpf_map_lookup_elem(&neighbours, &key);
	return n && n->identity == neighbour_identity(&key) &&
	       (__s64)(bpf_jiffies64() - n->expires) <= 0;
}

/*
 * Is what the pod says to its neighbours, in scratch, no more than what they
 * need to know, and to nobody else? Anything else is for policy to judge.
 */
__noinline int confined(struct __sk_buff *skb, __u32 where)
{
	struct scratch *s = scratch_get();
	struct gate *gate = gate_at(where);
	__u32 most = ND_HEADER + ND_OPTIONS_MAX, reserved = 0xffffffff;
	struct address target = {};
	struct packet *p;
	__u8 h[ND_HEADER];
	__be32 word;

	if (!s || !gate)
		return 0;
	p = &s->packet;
	if (p->ethertype != ETH_P_IPV6)
		return skb->len <= p->l3 + ETHER_MIN;
	if (bpf_skb_load_bytes(skb, p->l4, h, sizeof(h)) || h[1])
		return 0;
	if (p->icmp_type < ICMPV6_RS || p->icmp_type > ICMPV6_REDIRECT)
		return is_multicast(&p->key.peer) &&
		       p->l4 <= p->l3 + sizeof(struct ipv6hdr) + ROUTER_ALERT;
	if (p->icmp_type == ICMPV6_NS || p->icmp_type == ICMPV6_NA) {
		if (bpf_skb_load_bytes(skb, p->l4 + ND_HEADER, &target,
				       sizeof(target)))
			return 0;
		most += sizeof(target);
	}
	if (p->icmp_type == ICMPV6_NA)
		reserved = 0x1fffffff;
	__builtin_memcpy(&word, h + 4, sizeof(word));
	if ((bpf_ntohl(word) & reserved) || skb->len > p->l4 + most ||
	    p->l4 != p->l3 + sizeof(struct ipv6hdr))
		return 0;
	switch (p->icmp_type) {
	case ICMPV6_RS:
		return is_multicast(&p->key.peer);
	case ICMPV6_NS:
		if (is_solicited_node(&p->key.peer, &target))
			return 1;
		if (!address_equal(&p->key.peer, &target))
			return 0;
		break;
	case ICMPV6_NA:
		if (is_all_nodes(&p->key.peer))
			return 1;
		break;
	default:
		return 0;
	}
	return is_link_local(&p->key.peer) ||
	       is_neighbour(gate->endpoint, &p->key.peer);
}
