/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Copyright The podgate Authors */
/*
 * Does a pod speak for itself? Source MAC and address of what it sends, and
 * what it claims in ARP (RFC 826) and neighbour discovery (RFC 4861).
 */
#pragma once

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "gate.h"
#include "maps.h"
#include "packet.h"

#define ND_OPTIONS 4
#define ND_SOURCE_LINK 1
#define ND_TARGET_LINK 2

#define ARPHRD_ETHER 1

/* <linux/if_arp.h> drags in the C library. */
struct arp_v4 {
	__be16 hardware;
	__be16 protocol;
	__u8 hardware_length;
	__u8 protocol_length;
	__be16 operation;
	__u8 sender_mac[6];
	__u8 sender[4];
	__u8 target_mac[6];
	__u8 target[4];
} __attribute__((packed));

static __always_inline bool mac_equal(const __u8 *a, const __u8 *b)
{
	return !((a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]) | (a[3] ^ b[3]) |
		 (a[4] ^ b[4]) | (a[5] ^ b[5]));
}

/*
 * Is a source that is not the endpoint's own all right? Only the unspecified
 * address of a DHCP client (RFC 2131 4.1).
 */
static __always_inline bool is_dhcp(const struct packet *p)
{
	const __u64 *local = (const __u64 *)&p->key.local;
	const __u64 *peer = (const __u64 *)&p->key.peer;

	return p->key.protocol == IPPROTO_UDP && p->key.local_port == 68 &&
	       p->key.peer_port == 67 && local[0] == 0 && peer[0] == 0 &&
	       local[1] == 0xffff0000ULL && peer[1] == 0xffffffffffff0000ULL;
}

/* 0, or the reason to drop the ARP packet in scratch. */
__noinline int spoofs_arp(struct __sk_buff *skb, __u32 where)
{
	struct scratch *s = scratch_get();
	struct gate *gate = gate_at(where);
	struct address sender;
	struct arp_v4 arp;
	struct packet *p;
	__be32 v4;

	if (!s || !gate)
		return REASON_TABLE;
	p = &s->packet;
	if (bpf_skb_load_bytes(skb, p->l3, &arp, sizeof(arp)))
		return REASON_MALFORMED;
	if (arp.hardware != bpf_htons(ARPHRD_ETHER) ||
	    arp.protocol != bpf_htons(ETH_P_IP) || arp.hardware_length != 6 ||
	    arp.protocol_length != 4)
		return REASON_SPOOFED_NEIGHBOUR;
	if (!mac_equal(arp.sender_mac, gate->mac))
		return REASON_SPOOFED_NEIGHBOUR;
	__builtin_memcpy(&v4, arp.sender, 4);
	/* Address conflict detection probes from 0.0.0.0 (RFC 5227 2.1.1). */
	if (v4 == 0)
		return 0;
	address_v4(&sender, v4);
	return is_own(gate, &sender) ? 0 : REASON_SPOOFED_NEIGHBOUR;
}

/* 0, or the reason to drop the ICMPv6 packet in scratch. */
__noinline int spoofs_nd(struct __sk_buff *skb, __u32 where)
{
	struct scratch *s = scratch_get();
	struct gate *gate = gate_at(where);
	struct address target;
	struct packet *p;
	__u8 option[8];
	__u32 at;

	if (!s || !gate)
		return REASON_TABLE;
	p = &s->packet;
	at = p->l4 + 8;
	if (!address_is_zero(&p->key.local) && !is_own(gate, &p->key.local))
		return REASON_SPOOFED_ADDRESS;
	switch (p->icmp_type) {
	case ICMPV6_RA:
	case ICMPV6_REDIRECT:
		return REASON_SPOOFED_NEIGHBOUR;
	case ICMPV6_NS:
	case ICMPV6_NA:
		if (bpf_skb_load_bytes(skb, at, &target, sizeof(target)))
			return REASON_MALFORMED;
		if (p->icmp_type == ICMPV6_NA && !is_own(gate, &target))
			return REASON_SPOOFED_NEIGHBOUR;
		at += sizeof(target);
		break;
	case ICMPV6_RS:
		break;
	default:
		return 0;
	}
	for (int i = 0; i < ND_OPTIONS; i++) {
		if (bpf_skb_load_bytes(skb, at, option, 8))
			return 0;
		if (option[1] == 0)
			return REASON_MALFORMED;
		if ((option[0] == ND_SOURCE_LINK ||
		     option[0] == ND_TARGET_LINK) &&
		    !mac_equal(option + 2, gate->mac))
			return REASON_SPOOFED_NEIGHBOUR;
		at += (__u32)option[1] * 8;
	}
	/* More options than any stack sends: one of them may lie. */
	return REASON_SPOOFED_NEIGHBOUR;
}

/* 0, or the reason to drop a neighbour-keeping packet. */
static __always_inline int check_neighbour(struct __sk_buff *skb,
					   struct gate *gate,
					   const struct packet *p, __u32 where)
{
	__u32 dir = WHERE_DIR(where);
	bool spoof = dir == DIRECTION_EGRESS && (gate->flags & GATE_ANTI_SPOOF);

	if (p->ethertype == ETH_P_ARP)
		return spoof ? spoofs_arp(skb, where) : 0;
	if (p->first_fragment) /* RFC 6980 5 */
		return REASON_FRAGMENT;
	/* RFC 4861 6.1, 7.1: nothing that was routed. */
	if (p->icmp_type >= ICMPV6_RS && p->icmp_type <= ICMPV6_REDIRECT &&
	    p->hop_limit != 255)
		return REASON_MALFORMED;
	/* RFC 2710 3, RFC 3810 5: nor what a router would forward. */
	if ((p->icmp_type <= ICMPV6_MLD_LAST || p->icmp_type == ICMPV6_MLD2) &&
	    p->hop_limit != 1)
		return REASON_MALFORMED;
	return spoof ? spoofs_nd(skb, where) : 0;
}

/*
 * Sent by the node itself: it came in through no interface. The kernel takes
 * apart what it put together to look at, and IPv6 packets that it makes for
 * that have forgotten their interface (ip6_copy_metadata). The node's own
 * fragments have a socket.
 */
static __always_inline bool from_node(struct __sk_buff *skb,
				      const struct packet *p, __u32 dir)
{
	return dir == DIRECTION_INGRESS && !skb->ingress_ifindex &&
	       (!p->fragment || skb->sk);
}

/*
 * Is the source address one that the sender may not use? Not even the pod's
 * own comes in from elsewhere, whatever the pod may send from: IPv6 stacks
 * take such packets.
 */
static __always_inline bool spoofs(struct __sk_buff *skb, struct gate *gate,
				   const struct packet *p, __u32 dir)
{
	if (dir == DIRECTION_EGRESS)
		return (gate->flags & GATE_ANTI_SPOOF) &&
		       !is_own(gate, &p->key.local) && !is_dhcp(p);
	return address_equal(&p->key.local, &p->key.peer) &&
	       !from_node(skb, p, dir) && skb->ingress_ifindex != skb->ifindex;
}

/* Source MAC of what leaves the pod, target MAC of what reaches it. */
static __always_inline __u8 check_mac(struct __sk_buff *skb, struct gate *gate,
				      __u32 dir)
{
	void *data = (void *)(long)skb->data;
	void *end = (void *)(long)skb->data_end;
	struct ethhdr *eth = data;

	if (data + sizeof(*eth) > end)
		return REASON_MALFORMED;
	if (!(gate->flags & GATE_ANTI_SPOOF))
		return REASON_NONE;
	if (dir == DIRECTION_EGRESS)
		return mac_equal(eth->h_source, gate->mac) ? REASON_NONE :
							     REASON_SPOOFED_MAC;
	return (eth->h_dest[0] & 1) || mac_equal(eth->h_dest, gate->mac) ?
		       REASON_NONE :
		       REASON_OTHER_HOST;
}
