//go:build ignore

// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
// Copyright The podgate Authors
/*
 * The two programs on the host end of a pod's veth. from_pod judges what the
 * pod sends (tc ingress hook), to_pod what it receives (tc egress hook). An
 * allowed packet goes on to the programs of others (TC_ACT_UNSPEC, TCX_NEXT).
 */
#include <linux/errno.h>
#include <linux/pkt_cls.h>

#include "include/verdict.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* Makes bpf2go see the enums that no map value is typed with. */
const enum direction *const unused_direction __attribute__((unused));
const enum action *const unused_action __attribute__((unused));
const enum verdict *const unused_verdict __attribute__((unused));
const enum reason *const unused_reason __attribute__((unused));
const enum gate_flags *const unused_gate_flags __attribute__((unused));
const enum ruleset_flags *const unused_ruleset_flags __attribute__((unused));
const enum flow_kind *const unused_flow_kind __attribute__((unused));
const enum flow_state *const unused_flow_state __attribute__((unused));
const enum flow_flags *const unused_flow_flags __attribute__((unused));
const enum event_type *const unused_event_type __attribute__((unused));
const enum services_mode *const unused_services_mode __attribute__((unused));
const struct service_event *const unused_service_event __attribute__((unused));
const struct event *const unused_event __attribute__((unused));

/* unusual() left a flow to be looked up. */
#define CONTINUE 256
/* It passes, and after_nat judges it. */
#define DEFERRED 257

/*
 * Parses what is not a common shape and settles what has no flow.
 */
__noinline int unusual(struct __sk_buff *skb, __u32 where)
{
	struct scratch *s = scratch_get();
	struct gate *gate = gate_at(where);
	__u32 dir = WHERE_DIR(where);
	__u32 ruleset, reason;

	if (!s || !gate)
		return TC_ACT_SHOT;
	ruleset = ruleset_of(gate_rulesets(gate), dir);
	parse_slow(skb, dir);
	s->packet.key.endpoint = gate->endpoint;
	switch (s->packet.shape) {
	case SHAPE_FLOW:
		return CONTINUE;
	case SHAPE_NEIGHBOUR:
		reason = check_neighbour(skb, gate, &s->packet, where);
		if (reason)
			return refuse_for(skb, reason, where);
		if (dir == DIRECTION_INGRESS)
			meet_neighbour(skb, gate->endpoint);
		else if (ruleset != RULESET_OPEN && !confined(skb, where))
			return s->packet.ethertype == ETH_P_ARP ?
				       refuse_for(skb, REASON_MALFORMED,
						  where) :
				       judge_stateless(skb, where);
		break;
	case SHAPE_ALIEN:
		if (ruleset == RULESET_OPEN)
			break;
		return refuse_for(skb, REASON_ETHERTYPE, where);
	case SHAPE_FRAGMENT:
		if (recall_fragment(dir))
			return CONTINUE;
		if (spoofs(skb, gate, &s->packet, dir))
			return refuse_for(skb, REASON_SPOOFED_ADDRESS, where);
		if (ruleset == RULESET_OPEN)
			break;
		return refuse_for(skb, REASON_FRAGMENT, where);
	case SHAPE_ERROR:
		if (spoofs(skb, gate, &s->packet, dir) || !related(skb, where))
			return judge_stateless(skb, where);
		if (s->packet.first_fragment)
			remember_fragment(dir);
		break;
	case SHAPE_STATELESS:
		return judge_stateless(skb, where);
	default:
		return refuse_for(skb, s->packet.reason, where);
	}
	count(skb->len, WHERE_SLOT(where), dir, true);
	return TC_ACT_UNSPEC;
}

/*
 * Does a packet without a flow open one? What answers does not: a forged
 * answer must not let questions in.
 */
static __always_inline bool opens_flow(const struct packet *p)
{
	if (p->key.protocol == IPPROTO_TCP)
		return !(p->tcp_flags & TCP_RST) &&
		       (p->tcp_flags & (TCP_SYN | TCP_ACK)) !=
			       (TCP_SYN | TCP_ACK);
	if (p->key.protocol == IPPROTO_ICMP)
		return p->icmp_type == ICMP_ECHO;
	if (p->key.protocol == IPPROTO_ICMPV6)
		return p->icmp_type == ICMPV6_ECHO_REQUEST;
	return true;
}

/*
 * State changes of a flow: the first reply, TCP packets with SYN, FIN or RST,
 * and whatever follows a RST. The caller's packet has been allowed.
 */
static __noinline int flow_advance(struct flow *f, __u32 tcp_flags, __u32 dir,
				   __u64 now)
{
	__u8 fins = FLOW_FIN_INGRESS | FLOW_FIN_EGRESS;
	bool reply = dir != f->direction;

	if (tcp_opens(tcp_flags)) {
		if (!reply && f->state >= FLOW_CLOSING) {
			/* The port is used again. */
			f->state = FLOW_NEW;
			f->flags &= ~(fins | FLOW_RTT);
			f->created_ns = bpf_ktime_get_ns();
		}
	} else if (tcp_flags & TCP_RST) {
		f->state = FLOW_CLOSED;
	} else if (reply && f->state == FLOW_NEW) {
		f->state = FLOW_ESTABLISHED;
		if ((tcp_flags & TCP_SYN) && !(f->flags & FLOW_RTT)) {
			f->rtt_us = (bpf_ktime_get_ns() - f->created_ns) / 1000;
			f->flags |= FLOW_RTT;
		}
	}
	/* It goes on after all: the RST was not for real. */
	if (f->state == FLOW_CLOSED && !(tcp_flags & (TCP_SYN | TCP_RST)) &&
	    (f->flags & fins) != fins)
		f->state = FLOW_ESTABLISHED;
	if (tcp_flags & TCP_FIN) {
		f->flags |= dir == DIRECTION_INGRESS ? FLOW_FIN_INGRESS :
						       FLOW_FIN_EGRESS;
		if (f->state < FLOW_CLOSING)
			f->state = FLOW_CLOSING;
		if ((f->flags & fins) == fins)
			f->state = FLOW_CLOSED;
	}
	flow_touch(f, now);
	return 0;
}

/*
 * Leaves a packet to a Service to after_nat, with what is allowed of it as of
 * now. It is counted there.
 */
static __always_inline int defer(const struct flow_key *key, __u32 where,
				 __u64 translated, __u32 rule)
{
	struct handover *h;
	__u32 zero = 0;

	h = bpf_map_lookup_elem(&handovers, &zero);
	if (!h)
		return TC_ACT_SHOT;
	h->key = *key;
	h->translated = translated;
	h->tick = bpf_jiffies64();
	h->slot = WHERE_SLOT(where);
	h->rule = rule;
	return DEFERRED;
}

/*
 * An allowed packet of a flow: state, life, counters. judged says that the
 * flow was, under the rules of now.
 */
static __always_inline int pass(struct __sk_buff *skb,
				const struct flow_key *key, __u8 tcp_flags,
				struct flow *f, __u32 where, bool judged)
{
	__u32 dir = WHERE_DIR(where);
	__u64 now = bpf_jiffies64();

	if ((tcp_flags & (TCP_SYN | TCP_FIN | TCP_RST)) ||
	    f->state == FLOW_CLOSED ||
	    (f->state == FLOW_NEW && dir != f->direction))
		flow_advance(f, tcp_flags, dir, now);
	else if (now + flow_timeout(f->kind, f->state) - f->expires >
		 jiffies_per_second)
		flow_touch(f, now);
	f->packets[dir]++;
	f->bytes[dir] += skb->len;
	if (dir == DIRECTION_EGRESS && (f->flags & FLOW_SERVICE))
		return defer(key, where, judged ? f->translated : 0, f->rule);
	if (f->rule)
		count_rule(skb->len, f->rule);
	count(skb->len, WHERE_SLOT(where), dir, true);
	return TC_ACT_UNSPEC;
}

/*
 * Enters the flow of the first packet, in scratch, which was allowed. With
 * BPF_NOEXIST the result is CONTINUE when there is one.
 */
__noinline int open_flow(struct __sk_buff *skb, __u32 where, __u64 rulesets,
			 __u32 epoch, __u64 flags)
{
	struct scratch *s = scratch_get();
	struct gate *gate = gate_at(where);
	__u32 dir = WHERE_DIR(where);
	struct judgement *j;
	struct packet *p;
	struct event *e;
	struct flow *f;
	__u64 now_ns;
	int err;

	if (!s || !gate)
		return TC_ACT_SHOT;
	p = &s->packet;
	j = &s->judgement;
	f = &s->flow;
	__builtin_memset(f, 0, sizeof(*f));
	/* Only a handshake is measured. */
	now_ns = tcp_opens(p->tcp_flags) ? bpf_ktime_get_ns() : tick_ns(s);
	f->identity = flow_identity(&p->key);
	f->valid = flow_valid(f->identity, rulesets, epoch);
	f->created_ns = now_ns;
	f->rule = j->rule;
	f->ruleset = j->ruleset;
	f->class = j->class;
	f->owner = j->owner;
	f->direction = dir;
	f->kind = flow_kind_of(p->key.protocol);
	f->reason = j->reason;
	f->verdict =
		j->action == ACTION_ALLOW ? VERDICT_ALLOWED : VERDICT_AUDITED;
	if (j->reason == REASON_NODE && dir == DIRECTION_INGRESS)
		f->flags |= FLOW_NODE;
	if (j->reason == REASON_SELF && dir == DIRECTION_INGRESS)
		f->flags |= FLOW_HAIRPIN;
	if (j->reason == REASON_SERVICE)
		f->flags |= FLOW_SERVICE;
	if (dir == DIRECTION_EGRESS || is_own(gate, &p->key.local))
		f->flags |= FLOW_VERIFIED;
	/* Open since before podgate: there will be no handshake. */
	if (p->key.protocol == IPPROTO_TCP && !tcp_opens(p->tcp_flags))
		f->state = FLOW_ESTABLISHED;
	if (p->tcp_flags & TCP_FIN)
		f->state = FLOW_CLOSING;
	f->packets[dir] = 1;
	f->bytes[dir] = skb->len;
	flow_touch(f, bpf_jiffies64());
	if (j->reason == REASON_SERVICE) {
		err = bpf_map_update_elem(&flows, &p->key, f, flags);
		if (!err)
			return defer(&p->key, where, 0, 0);
		return err == -EEXIST ? CONTINUE :
					refuse_for(skb, REASON_TABLE, where);
	}
	/*
	 * Whether there is a record is asked once: 5.10 forgets what an
	 * earlier look has found, and takes it for leaked.
	 */
	e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);
	if (e) {
		fill(e, s, skb->len, skb->ifindex,
		     f->verdict == VERDICT_ALLOWED ? EVENT_FLOW : EVENT_AUDIT,
		     dir, now_ns);
		err = bpf_map_update_elem(&flows, &p->key, f, flags);
		if (err)
			bpf_ringbuf_discard(e, BPF_RB_NO_WAKEUP);
		else
			submit(s, e);
	} else {
		lose();
		err = bpf_map_update_elem(&flows, &p->key, f, flags);
	}
	if (err == -EEXIST)
		return CONTINUE;
	if (err)
		return refuse_for(skb, REASON_TABLE, where);
	if (j->rule)
		count_rule(skb->len, j->rule);
	count(skb->len, WHERE_SLOT(where), dir, true);
	return TC_ACT_UNSPEC;
}

/*
 * Did the pod send the packet that reaches it? One to its own Service comes
 * back with an address of the node: kube-proxy masquerades it.
 */
static __always_inline bool is_hairpin(struct __sk_buff *skb, __u32 where)
{
	return WHERE_DIR(where) == DIRECTION_INGRESS &&
	       services_mode() != SERVICES_NONE &&
	       (skb->tc_index & TAG_SLOT) == TAG(WHERE_SLOT(where));
}

/*
 * A known flow, just judged: if it is one of a Service, what the pod sends is
 * left to after_nat, and what it receives is judged by the backend.
 */
static __always_inline bool is_left(struct scratch *s, struct flow *f,
				    __u32 dir, __u64 rulesets, __u32 epoch)
{
	struct judgement *j = &s->judgement;

	if (!goes_on(j, f)) {
		f->flags &= ~FLOW_SERVICE;
		f->translated = 0;
		return false;
	}
	f->flags |= FLOW_SERVICE;
	if (dir == DIRECTION_EGRESS) {
		/* What was allowed is not to be trusted until it is again. */
		if (!f->translated)
			f->valid = flow_valid(flow_identity(&s->packet.key),
					      rulesets, epoch);
		return true;
	}
	s->quoted.key = s->packet.key;
	judge_backend(rulesets, f);
	/* The backend's address has another owner. */
	if (f->owner && j->owner && f->owner != j->owner)
		settle(j, ACTION_DENY, REASON_TABLE);
	return false;
}

/*
 * The packet in scratch, whose flow is unknown, expired or judged under older
 * rules. The epoch is read before the classes, so a change in between is seen
 * at the next packet.
 */
__noinline int decide(struct __sk_buff *skb, __u32 where, __u32 known)
{
	struct scratch *s = scratch_get();
	struct gate *gate = gate_at(where);
	__u32 epoch = current_epoch();
	__u32 dir = WHERE_DIR(where), how;
	struct flow *f = NULL;
	__u64 rulesets;
	struct judgement *j;
	bool alive = false;
	struct packet *p;
	int action;

	if (!s || !gate)
		return TC_ACT_SHOT;
	p = &s->packet;
	j = &s->judgement;
	rulesets = gate_rulesets(gate);
	if (spoofs(skb, gate, p, dir))
		return refuse_for(skb, REASON_SPOOFED_ADDRESS, where);
	how = HOW(dir, from_node(skb, p, dir), false, icmp_coordinate(p));
	if (is_hairpin(skb, where))
		how |= HOW_HAIRPIN;
	if (tcp_opens(p->tcp_flags)) {
		/* No flow lets in a SYN that would not get in by itself. */
		judge_first(j, ruleset_of(rulesets, dir), how);
		if (j->action == ACTION_DENY && !(gate->flags & GATE_AUDIT))
			return refuse(skb, where);
		action = open_flow(skb, where, rulesets, epoch, BPF_NOEXIST);
		if (action != CONTINUE)
			return action;
		known = true;
	}
	if (known)
		f = bpf_map_lookup_elem(&flows, &p->key);
	if (f)
		alive = f->identity == flow_identity(&p->key) &&
			!flow_expired(f, bpf_jiffies64());
	/* A SYN from the other side asks for a connection of its own. */
	if (f && alive && (dir == f->direction || !tcp_opens(p->tcp_flags))) {
		if (judge_flow(j, rulesets, f, p->key.protocol, false)) {
			if (is_left(s, f, dir, rulesets, epoch))
				return pass(skb, &p->key, p->tcp_flags, f,
					    where, false);
			if (j->action == ACTION_DENY &&
			    !(gate->flags & GATE_AUDIT))
				return refuse(skb, where);
			if (j->action == ACTION_DENY &&
			    f->verdict == VERDICT_ALLOWED)
				emit(skb, EVENT_AUDIT, dir);
			f->verdict = j->action == ACTION_ALLOW ?
					     VERDICT_ALLOWED :
					     VERDICT_AUDITED;
			f->rule = j->rule;
			f->ruleset = j->ruleset;
			f->class = j->class;
			f->reason = j->reason;
			if (j->owner)
				f->owner = j->owner;
			/* The entry may be another key's by now. */
			f->valid = flow_valid(flow_identity(&p->key), rulesets,
					      epoch);
			return pass(skb, &p->key, p->tcp_flags, f, where, true);
		}
		/* The flow was a former owner's of the peer address. */
		alive = false;
	}

	judge_first(j, ruleset_of(rulesets, dir), how);
	if (j->action == ACTION_DENY &&
	    (!opens_flow(p) || !(gate->flags & GATE_AUDIT)))
		return refuse(skb, where);
	if (!opens_flow(p) ||
	    (f && alive && f->state < FLOW_CLOSING && dir != f->direction)) {
		if (j->reason == REASON_SERVICE)
			return DEFERRED;
		count(skb->len, WHERE_SLOT(where), dir, true);
		return TC_ACT_UNSPEC;
	}
	return open_flow(skb, where, rulesets, epoch, BPF_ANY);
}

/*
 * A packet through conntrack. p is complete; in_scratch says that it is the
 * one in scratch.
 */
static __always_inline int track(struct __sk_buff *skb, struct gate *gate,
				 struct packet *p, __u32 where, bool in_scratch)
{
	bool opens = tcp_opens(p->tcp_flags);
	__u32 dir = WHERE_DIR(where);
	struct flow *f = NULL;
	struct scratch *s;
	int action;

	if (!opens)
		f = bpf_map_lookup_elem(&flows, &p->key);
	if (f &&
	    f->valid == flow_valid(flow_identity(&p->key), gate_rulesets(gate),
				   current_epoch()) &&
	    !flow_expired(f, bpf_jiffies64()) &&
	    (dir == DIRECTION_INGRESS || (f->flags & FLOW_VERIFIED))) {
		action = pass(skb, &p->key, p->tcp_flags, f, where, true);
	} else {
		if (!in_scratch) {
			s = scratch_get();
			if (!s)
				return TC_ACT_SHOT;
			packet_keep(&s->packet, p);
		}
		action = decide(skb, where, f != NULL);
	}
	return action;
}

/* A packet of an unusual shape. */
__noinline int slow_path(struct __sk_buff *skb, __u32 where)
{
	struct scratch *s = scratch_get();
	struct gate *gate = gate_at(where);
	int action;

	if (!s || !gate)
		return TC_ACT_SHOT;
	action = unusual(skb, where);
	if (action != CONTINUE)
		return action;
	action = track(skb, gate, &s->packet, where, true);
	if ((action == TC_ACT_UNSPEC || action == DEFERRED) &&
	    s->packet.first_fragment)
		remember_fragment(WHERE_DIR(where));
	return action;
}

/* A frame that is refused for more than what policy says of its packet. */
__noinline int refuse_frame(struct __sk_buff *skb, __u32 where, __u32 reason)
{
	struct scratch *s = scratch_get();
	struct gate *gate = gate_at(where);

	if (!s || !gate)
		return TC_ACT_SHOT;
	parse_slow(skb, WHERE_DIR(where));
	s->packet.key.endpoint = gate->endpoint;
	return refuse_for(skb, reason, where);
}

/* Runs a probe (see types.h): the answer goes back in cb[]. */
__noinline int probe(struct __sk_buff *skb, __u32 dir)
{
	__u32 slot = skb->cb[1] & gate_mask;
	struct scratch *s = scratch_get();
	struct gate *gate = gate_at(WHERE(slot, dir));
	struct judgement *j;

	if (!s || !gate)
		return TC_ACT_SHOT;
	j = &s->judgement;
	__builtin_memset(j, 0, sizeof(*j));
	parse_slow(skb, dir);
	s->packet.key.endpoint = gate->endpoint;
	if (s->packet.shape == SHAPE_BAD)
		j->reason = s->packet.reason;
	else if (spoofs(skb, gate, &s->packet, dir))
		j->reason = REASON_SPOOFED_ADDRESS;
	else
		judge_first(j, ruleset_of(gate_rulesets(gate), dir),
			    HOW(dir, skb->cb[2] & PROBE_LOCAL_ORIGIN, false,
				icmp_coordinate(&s->packet)) |
				    HOW_AHEAD);
	skb->cb[0] = j->action == ACTION_ALLOW ? VERDICT_ALLOWED :
		     audits(gate, j->reason)   ? VERDICT_AUDITED :
						 VERDICT_DENIED;
	skb->cb[1] = j->reason;
	skb->cb[2] = j->rule;
	skb->cb[3] = j->class;
	skb->cb[4] = j->ruleset;
	return skb->cb[0] == VERDICT_DENIED ? TC_ACT_SHOT : TC_ACT_UNSPEC;
}

/* The hook is on an interface that no endpoint owns, or this is a probe. */
__noinline int no_gate(struct __sk_buff *skb, __u32 dir)
{
	if (skb->ifindex == PROBE_LOOPBACK && skb->cb[0] == PROBE_MAGIC)
		return probe(skb, dir);
	count_drop(skb->len, REASON_NO_GATE, dir);
	return TC_ACT_SHOT;
}

/*
 * Leaves word of who sent a packet that passes, and whether it was judged.
 * Bridges do not show netfilter what has a VLAN tag.
 */
static __always_inline int tag(struct __sk_buff *skb, __u32 where, int action)
{
	__u32 slot = WHERE_SLOT(where);

	if (action == DEFERRED) {
		if (skb->vlan_present)
			return refuse_frame(skb, where, REASON_ETHERTYPE);
		skb->tc_index = TAG(slot);
		return TC_ACT_UNSPEC;
	}
	if (action == TC_ACT_UNSPEC && services_mode() != SERVICES_NONE)
		skb->tc_index = TAG_JUDGED | TAG(slot);
	return action;
}

static __always_inline int gate_packet(struct __sk_buff *skb, __u32 dir)
{
	struct gate *gate;
	struct packet p;
	__u32 slot, where;
	__u8 reason;
	int action;

	gate = find_gate(skb->ifindex, &slot);
	if (!gate)
		return no_gate(skb, dir);
	where = WHERE(slot, dir);
	reason = check_mac(skb, gate, dir);
	if (reason)
		return refuse_frame(skb, where, reason);
	if (!parse_fast(skb, dir, gate->endpoint, &p))
		action = slow_path(skb, where);
	else
		action = track(skb, gate, &p, where, false);
	return dir == DIRECTION_EGRESS ? tag(skb, where, action) : action;
}

SEC("tc")
int from_pod(struct __sk_buff *skb)
{
	return gate_packet(skb, DIRECTION_EGRESS);
}

SEC("tc")
int to_pod(struct __sk_buff *skb)
{
	return gate_packet(skb, DIRECTION_INGRESS);
}
