/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Copyright The podgate Authors */
/* Judging what is in scratch, known flows and ICMP errors, and refusing it. */
#pragma once

#include <linux/pkt_cls.h>

#include "conntrack.h"
#include "event.h"
#include "fragment.h"
#include "gate.h"
#include "judge.h"
#include "neighbour.h"
#include "spoof.h"

static __always_inline __u16 echo_coordinate(__u8 protocol)
{
	return (protocol == IPPROTO_ICMPV6 ? ICMPV6_ECHO_REQUEST : ICMP_ECHO)
	       << 8;
}

/* What counts as the port of an ICMP packet; a flow is that of its request. */
static __always_inline __u16 icmp_coordinate(const struct packet *p)
{
	if (p->shape == SHAPE_FLOW)
		return echo_coordinate(p->key.protocol);
	return (__u16)p->icmp_type << 8 | p->icmp_code;
}

/*
 * Does audit mode let through what is refused for that? Not who speaks for
 * others: that is no matter of policy, nor of the audited endpoint alone.
 */
static __always_inline bool audits(const struct gate *gate, __u32 reason)
{
	return (gate->flags & GATE_AUDIT) && reason != REASON_SPOOFED_MAC &&
	       reason != REASON_SPOOFED_ADDRESS &&
	       reason != REASON_SPOOFED_NEIGHBOUR;
}

/*
 * Drops the packet in scratch for what scratch->judgement says, or lets it
 * pass on an audited endpoint. The result is the action for tc.
 */
__noinline int refuse(struct __sk_buff *skb, __u32 where)
{
	struct scratch *s = scratch_get();
	struct gate *gate = gate_at(where);
	__u32 dir = WHERE_DIR(where);
	struct judgement *j;
	bool audit;

	if (!s || !gate)
		return TC_ACT_SHOT;
	j = &s->judgement;
	audit = audits(gate, j->reason);
	count(skb->len, WHERE_SLOT(where), dir, audit);
	/* Frames that a bridge floods are nobody's news. */
	if (j->reason != REASON_OTHER_HOST)
		emit(skb, audit ? EVENT_AUDIT : EVENT_DROP, dir);
	if (audit)
		return TC_ACT_UNSPEC;
	count_drop(skb->len, j->reason, dir);
	if (j->rule)
		count_rule(skb->len, j->rule);
	return TC_ACT_SHOT;
}

__noinline int refuse_for(struct __sk_buff *skb, __u32 reason, __u32 where)
{
	struct scratch *s = scratch_get();
	struct gate *gate = gate_at(where);

	if (!s || !gate)
		return TC_ACT_SHOT;
	__builtin_memset(&s->judgement, 0, sizeof(s->judgement));
	s->judgement.reason = reason;
	s->judgement.ruleset =
		ruleset_of(gate_rulesets(gate), WHERE_DIR(where));
	return refuse(skb, where);
}

/*
 * Judges a known flow, whose key is in scratch, under the rulesets of now.
 * Returns false when the entry is not to be used: its peer's address has
 * another owner.
 */
static __always_inline bool judge_flow(struct judgement *j, __u64 rulesets,
				       const struct flow *f, __u8 protocol,
				       bool quoted)
{
	__u32 opened = f->direction & 1;

	judge_first(j, ruleset_of(rulesets, opened),
		    HOW(opened, f->flags & FLOW_NODE, quoted,
			echo_coordinate(protocol)) |
			    (f->flags & FLOW_HAIRPIN ? HOW_HAIRPIN : 0));
	return !(f->owner && j->owner && f->owner != j->owner);
}

/*
 * Is a flow, just judged, to be judged by what its packets are translated to?
 * One that was, is, even when the frontend is gone: connections outlive it.
 */
static __always_inline bool goes_on(const struct judgement *j,
				    const struct flow *f)
{
	return j->reason == REASON_SERVICE ||
	       ((f->flags & FLOW_SERVICE) && f->translated &&
		j->reason != REASON_OPEN && services_mode() == SERVICES_AFTER);
}

/*
 * Makes the key of the quoted packet, which is that of a Service's flow, the
 * one with the backend that it had when it was allowed. Without one the result
 * is 0 and the judgement settled: a flow that never was allowed passes unless
 * it was refused, since after_nat sees what the pod sends.
 */
__noinline int recall_backend(__u64 translated, __u32 verdict)
{
	struct scratch *s = scratch_get();
	struct backend *b;

	if (!s)
		return 0;
	settle(&s->judgement, ACTION_DENY, REASON_TABLE);
	if (!translated) {
		settle(&s->judgement,
		       verdict == VERDICT_DENIED ? ACTION_DENY : ACTION_ALLOW,
		       REASON_SERVICE);
		return 0;
	}
	/* It was not translated. */
	if (flow_identity(&s->quoted.key) == translated)
		return 1;
	b = bpf_map_lookup_elem(&backends, &s->quoted.key);
	if (!b)
		return 0;
	address_copy(&s->quoted.key.peer, &b->address);
	s->quoted.key.peer_port = b->port;
	return flow_identity(&s->quoted.key) == translated;
}

/* Judges the flow of a Service by its backend. */
static __always_inline void judge_backend(__u64 rulesets, const struct flow *f)
{
	if (recall_backend(f->translated, f->verdict))
		judge(ruleset_of(rulesets, DIRECTION_EGRESS),
		      HOW(DIRECTION_EGRESS, false, true, 0) | HOW_TRANSLATED);
}

/* The addresses of a quoted packet, as the other hook saw it. */
__noinline int quoted_v4(struct __sk_buff *skb, __u32 at, __u32 dir)
{
	struct scratch *s = scratch_get();
	struct address source, destination;
	struct iphdr ip;

	if (!s || bpf_skb_load_bytes(skb, at, &ip, sizeof(ip)) ||
	    *(__u8 *)&ip >> 4 != 4 || (*(__u8 *)&ip & 0xf) < 5 ||
	    (ip.frag_off & bpf_htons(IP_OFFSET)))
		return 0;
	address_v4(&source, ip.saddr);
	address_v4(&destination, ip.daddr);
	packet_addresses(&s->quoted, dir, &source, &destination);
	s->quoted.key.protocol = ip.protocol;
	return at + (*(__u8 *)&ip & 0xf) * 4;
}

__noinline int quoted_v6(struct __sk_buff *skb, __u32 at, __u32 dir)
{
	struct ipv6hdr ip __attribute__((aligned(8)));
	struct scratch *s = scratch_get();
	__u8 fragment[8];

	if (!s || bpf_skb_load_bytes(skb, at, &ip, sizeof(ip)) ||
	    *(__u8 *)&ip >> 4 != 6)
		return 0;
	packet_addresses(&s->quoted, dir, (struct address *)&ip.saddr,
			 (struct address *)&ip.daddr);
	s->quoted.key.protocol = ip.nexthdr;
	at += sizeof(ip);
	if (ip.nexthdr != IPPROTO_FRAGMENT)
		return at;
	if (bpf_skb_load_bytes(skb, at, fragment, 8) || fragment[2] ||
	    (fragment[3] & 0xf8))
		return 0;
	s->quoted.key.protocol = fragment[0];
	return at + 8;
}

/* Ports and echo identifiers of the quoted packet. */
__noinline int quoted_upper(struct __sk_buff *skb, __u32 at, __u32 dir)
{
	struct scratch *s = scratch_get();
	__u16 source, destination;
	__u8 h[8] = {};

	if (!s || bpf_skb_load_bytes(skb, at, h, 8))
		return 0;
	source = (__u16)h[0] << 8 | h[1];
	destination = (__u16)h[2] << 8 | h[3];
	switch (s->quoted.key.protocol) {
	case IPPROTO_TCP:
	case IPPROTO_UDP:
	case IPPROTO_SCTP:
		break;
	case IPPROTO_ICMP:
	case IPPROTO_ICMPV6:
		source = (__u16)h[4] << 8 | h[5];
		destination = 0;
		if (h[0] == ICMP_ECHO || h[0] == ICMPV6_ECHO_REQUEST)
			break;
		if (h[0] != ICMP_ECHOREPLY && h[0] != ICMPV6_ECHO_REPLY)
			return 0;
		destination = source;
		source = 0;
		break;
	default:
		source = 0;
		destination = 0;
	}
	packet_ports(&s->quoted, dir, source, destination);
	return 1;
}

/*
 * Is the ICMP error in scratch about a flow that is allowed (RFC 5927)? Routers
 * tell the pod of what it sent; the pod tells only who sent it something
 * (RFC 1122 3.2.2, RFC 4443 2.2).
 */
__noinline int related(struct __sk_buff *skb, __u32 where)
{
	__u32 quoted_dir = WHERE_DIR(where) ^ 1;
	struct scratch *s = scratch_get();
	struct gate *gate = gate_at(where);
	struct packet *q;
	struct flow *f;
	__u64 rulesets;
	__u32 at;

	if (!s || !gate)
		return 0;
	q = &s->quoted;
	__builtin_memset(q, 0, sizeof(*q));
	at = s->packet.l4 + 8;
	at = s->packet.ethertype == ETH_P_IP ? quoted_v4(skb, at, quoted_dir) :
					       quoted_v6(skb, at, quoted_dir);
	if (!at || !quoted_upper(skb, at, quoted_dir) ||
	    !address_equal(&s->packet.key.local, &q->key.local) ||
	    (WHERE_DIR(where) == DIRECTION_EGRESS &&
	     !address_equal(&s->packet.key.peer, &q->key.peer)))
		return 0;
	q->key.endpoint = gate->endpoint;
	f = bpf_map_lookup_elem(&flows, &q->key);
	if (!f || f->identity != flow_identity(&q->key) ||
	    flow_expired(f, bpf_jiffies64()))
		return 0;
	rulesets = gate_rulesets(gate);
	if (!judge_flow(&s->judgement, rulesets, f, q->key.protocol, true))
		return 0;
	if (goes_on(&s->judgement, f))
		judge_backend(rulesets, f);
	return s->judgement.action == ACTION_ALLOW;
}

/* Policy for a packet in scratch that opens no flow. */
__noinline int judge_stateless(struct __sk_buff *skb, __u32 where)
{
	struct scratch *s = scratch_get();
	struct gate *gate = gate_at(where);
	__u32 dir = WHERE_DIR(where);

	if (!s || !gate)
		return TC_ACT_SHOT;
	if (spoofs(skb, gate, &s->packet, dir))
		return refuse_for(skb, REASON_SPOOFED_ADDRESS, where);
	judge_first(&s->judgement, ruleset_of(gate_rulesets(gate), dir),
		    HOW(dir, from_node(skb, &s->packet, dir), false,
			icmp_coordinate(&s->packet)));
	if (s->judgement.action == ACTION_DENY)
		return refuse(skb, where);
	count(skb->len, WHERE_SLOT(where), dir, true);
	if (s->judgement.rule)
		count_rule(skb->len, s->judgement.rule);
	if (s->packet.first_fragment)
		remember_fragment(dir);
	return TC_ACT_UNSPEC;
}
