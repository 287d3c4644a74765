/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Copyright The podgate Authors */
/*
 * Policy: address to class, (ruleset, class) to intervals, interval to
 * verdict. Reads only; knows nothing of flows, counters or policy kinds.
 */
#pragma once

#include <bpf/bpf_helpers.h>

#include "config.h"
#include "event.h"
#include "gate.h"
#include "maps.h"
#include "packet.h"

/* Answers of find_interval beside an interval. */
#define CELL_ABSENT (1ULL << 62)
#define CELL_RECYCLED (2ULL << 62)
#define CELL_DEFAULT (3ULL << 62)
/* The class could not be read. No class has this number. */
#define PEER_UNKNOWN (~0ULL)
/* The service could not be read. No service has this number. */
#define SERVICE_UNKNOWN (~0U)
/* 2^14 chunks are searched in this many halvings. */
#define CELL_SEARCH 14

static __always_inline __u16 address_tag(const struct address *a)
{
	const __u64 *w = (const __u64 *)a;
	__u64 x = w[0] ^ w[1];

	x ^= x >> 32;
	x ^= x >> 16;
	return x;
}

static __always_inline __u16 frontend_tag(const struct frontend_key *k)
{
	return address_tag(&k->address) ^ k->port ^ k->protocol;
}

/*
 * The interval of a cell that at falls into, as action << 32 | rule, or one of
 * the CELL_ answers.
 */
static __always_inline __u64 find_interval(__u32 ruleset, __u32 class, __u32 at)
{
	struct cell_key key = { .ruleset = ruleset, .class = class };
	struct cell *cell = bpf_map_lookup_elem(&cells, &key);
	__u64 answer = CELL_DEFAULT;
	__u32 low = 0, high;

	if (!cell)
		return CELL_ABSENT;
	if (cell->chunks > 1) {
		high = cell->chunks - 1;
		for (int i = 0; i < CELL_SEARCH; i++) {
			if (low >= high)
				break;
			key.chunk = (low + high + 1) / 2;
			cell = bpf_map_lookup_elem(&cells, &key);
			if (!cell)
				return CELL_RECYCLED;
			if (at < cell->intervals[0].first)
				high = key.chunk - 1;
			else
				low = key.chunk;
		}
		key.chunk = low;
		cell = bpf_map_lookup_elem(&cells, &key);
		if (!cell)
			return CELL_RECYCLED;
	}
	for (int i = 0; i < CELL_INTERVALS; i++) {
		struct interval *v = &cell->intervals[i];

		if (i < cell->count && at >= v->first && at <= v->last) {
			answer = (__u64)(v->action & 1) << 32 | v->rule;
			break;
		}
	}
	/* Checked last: the element may have become another cell meanwhile. */
	if (*(volatile __u32 *)&cell->ruleset != ruleset ||
	    *(volatile __u32 *)&cell->class != class ||
	    *(volatile __u32 *)&cell->chunk != key.chunk)
		return CELL_RECYCLED;
	return answer;
}

static __always_inline int settle(struct judgement *j, __u8 action, __u8 reason)
{
	j->action = action & 1;
	j->reason = reason;
	return action & 1;
}

/* The class of an address as a struct peer in one u64; 0 for everyone else. */
static __always_inline __u64 classify(struct scratch *s,
				      const struct address *a)
{
	__u64 *found, value;

	/*
	 * The value of a hash element may be recycled for another key while
	 * it is read; the tag tells. An updated key is never missing.
	 */
	for (int i = 0; i < 3; i++) {
		found = bpf_map_lookup_elem(&peers, a);
		if (!found)
			break;
		value = *(volatile __u64 *)found;
		if (value >> 48 == address_tag(a))
			return value;
		if (i == 2)
			return PEER_UNKNOWN;
	}
	s->block.prefixlen = 128;
	__builtin_memcpy(s->block.address, a->bytes, 16);
	found = bpf_map_lookup_elem(&blocks, &s->block);
	return found ? *(volatile __u64 *)found : 0;
}

/* How a packet is to be judged, in one scalar. */
#define HOW(dir, from_node, quoted, icmp)             \
	((__u32)(icmp) << 16 | ((quoted) ? 4U : 0U) | \
	 ((from_node) ? 2U : 0U) | (dir))
#define HOW_DIR(how) ((how) & 1)
#define HOW_FROM_NODE(how) ((how) & 2)
#define HOW_QUOTED(how) ((how) & 4)
#define HOW_ICMP(how) ((how) >> 16)
/* Flags for how. The peer is what a Service was translated to. */
#define HOW_TRANSLATED 8U
/* It will be: judge what it may come to, now. This is a probe. */
#define HOW_AHEAD 16U
/* The packet may be the pod's own, with the node's address by masquerading. */
#define HOW_HAIRPIN 32U
/* What verdicts are remembered by, beside the direction. */
#define HOW_KIND HOW_TRANSLATED

/* Where this CPU remembers a verdict, whatever it remembers there now. */
static __always_inline struct judged *judged_at(struct scratch *s,
						const struct address *peer,
						__u32 ruleset, __u32 at)
{
	const __u64 *w = (const __u64 *)peer;
	__u64 x = (w[0] ^ w[1] ^ ((__u64)ruleset << 32 | at)) *
		  0x9e3779b97f4a7c15ULL;

	return &s->judged[(x >> 56) & (JUDGED - 1)];
}

/* The verdict of the ruleset on a peer of a class. */
static __always_inline int judge_class(struct judgement *j, __u32 peer,
				       __u32 dir, __u32 at)
{
	__u32 ruleset_id = j->ruleset, class = peer & PEER_CLASS;
	struct ruleset *ruleset;
	__u64 found;

	if (dir == DIRECTION_EGRESS && (peer & PEER_NODE))
		return settle(j, ACTION_ALLOW, REASON_NODE);
	if (ruleset_id == RULESET_CLOSED)
		return settle(j, ACTION_DENY, REASON_CLOSED);

	ruleset = bpf_map_lookup_elem(&rulesets, &ruleset_id);
	if (!ruleset || !(ruleset->flags & RULESET_USED))
		return settle(j, ACTION_DENY, REASON_TABLE);
	found = find_interval(ruleset_id, class, at);
	if (found == CELL_ABSENT && (ruleset->flags & RULESET_ANY_PEER) &&
	    class)
		found = find_interval(ruleset_id, 0, at);
	if (found == CELL_RECYCLED)
		return settle(j, ACTION_DENY, REASON_TABLE);
	if (found == CELL_ABSENT || found == CELL_DEFAULT) {
		j->rule = ruleset->rule;
		return settle(j, ruleset->action, REASON_DEFAULT);
	}
	j->rule = found;
	return settle(j, found >> 32, REASON_POLICY);
}

/* The verdict on backends that policy cannot tell apart. */
__noinline int judge_choice(__u32 peer, __u32 at)
{
	struct scratch *s = scratch_get();

	if (!s)
		return ACTION_DENY;
	s->judgement.rule = 0;
	s->judgement.class = peer & PEER_CLASS;
	return judge_class(&s->judgement, peer, DIRECTION_EGRESS, at);
}

/* The peer of the packet at hand. */
static __always_inline const struct address *peer_of(const struct scratch *s,
						     __u32 how)
{
	return HOW_QUOTED(how) ? &s->quoted.key.peer : &s->packet.key.peer;
}

/* Is the peer this node? */
__noinline int peer_is_node(__u32 how)
{
	struct scratch *s = scratch_get();
	__u64 peer;

	if (!s)
		return 0;
	peer = classify(s, peer_of(s, how));
	return peer != PEER_UNKNOWN && ((__u32)peer & PEER_NODE);
}

/* The Service with a frontend there, 0 if there is none. */
static __always_inline __u32 find_service(struct scratch *s,
					  const struct address *a, __u32 at)
{
	struct frontend_key *key = &s->frontend;
	__u64 *found, value;

	__builtin_memset(key, 0, sizeof(*key));
	address_copy(&key->address, a);
	key->port = at;
	key->protocol = at >> 16;
	/* As in classify. */
	for (int i = 0; i < 3; i++) {
		found = bpf_map_lookup_elem(&frontends, key);
		if (!found)
			return 0;
		value = *(volatile __u64 *)found;
		if ((__u16)(value >> 32) == frontend_tag(key))
			return value;
	}
	return SERVICE_UNKNOWN;
}

/* The destination port and protocol; for ICMP, the type and code in how. */
static __always_inline __u32 coordinate(const struct flow_key *key, __u32 how)
{
	__u32 at = (__u32)key->protocol << 16;

	if (key->protocol == IPPROTO_ICMP || key->protocol == IPPROTO_ICMPV6)
		return at | HOW_ICMP(how);
	return at | (HOW_DIR(how) == DIRECTION_EGRESS ? key->peer_port :
							key->local_port);
}

/* Does kube-proxy, or portmap, translate it? */
static __always_inline bool is_mapped(__u8 protocol)
{
	return protocol == IPPROTO_TCP || protocol == IPPROTO_UDP ||
	       protocol == IPPROTO_SCTP;
}

/*
 * The verdict on a marked peer, whose class is in scratch->judgement. To the
 * frontend of a Service it is that on all backends, if they agree, unless the
 * backend is judged later. So is what is sent to the node, whose ports may lead
 * to pods (hostPort).
 */
__noinline int judge_service(__u32 how)
{
	struct scratch *s = scratch_get();
	__u32 id, count, at, class, allowed = 0;
	const struct address *peer;
	struct service *service;
	struct judgement *j;

	if (!s)
		return ACTION_DENY;
	j = &s->judgement;
	peer = peer_of(s, how);
	at = coordinate(HOW_QUOTED(how) ? &s->quoted.key : &s->packet.key, how);
	class = j->class;
	id = find_service(s, peer, at);
	if (!id) {
		if (!(class & PEER_NODE) || !is_mapped(at >> 16) ||
		    services_mode() != SERVICES_AFTER || (how & HOW_AHEAD))
			return judge_choice(class, at);
		j->rule = 0;
		j->class = class & PEER_CLASS;
		return settle(j, ACTION_ALLOW, REASON_SERVICE);
	}
	service = bpf_map_lookup_elem(&services, &id);
	if (!service)
		return settle(j, ACTION_DENY, REASON_TABLE);
	/* On their link, a pod of this node gets the packet as it is. */
	if (bpf_map_lookup_elem(&claims, peer) &&
	    judge_choice(class, at) == ACTION_DENY)
		return ACTION_DENY;
	j->rule = 0;
	j->class = class & PEER_CLASS;
	if (services_mode() == SERVICES_AFTER && !(how & HOW_AHEAD))
		return settle(j, ACTION_ALLOW, REASON_SERVICE);
	count = *(volatile __u32 *)&service->count;
	/* Nothing is translated. */
	if (!count)
		return judge_choice(class, at);
	for (__u32 i = 0; i < SERVICE_CHOICES; i++) {
		struct choice *c = &service->choices[i];

		if (i >= count)
			break;
		allowed +=
			judge_choice(c->class, (at & 0xff0000) | c->port) & 1;
	}
	/* Checked last: the element may have become another one meanwhile. */
	if (*(volatile __u32 *)&service->id != id)
		return settle(j, ACTION_DENY, REASON_TABLE);
	if (count > SERVICE_CHOICES || (allowed && allowed != count)) {
		j->rule = 0;
		return settle(j, ACTION_DENY, REASON_SERVICE_MIXED);
	}
	return j->action;
}

/* The verdict of the ruleset by the tables, in scratch->judgement. */
static __always_inline int judge_peer(struct scratch *s,
				      const struct address *address, __u32 how,
				      __u32 at)
{
	struct judgement *j = &s->judgement;
	__u32 dir = HOW_DIR(how);
	__u64 peer;

	peer = classify(s, address);
	if (peer == PEER_UNKNOWN)
		return settle(j, ACTION_DENY, REASON_TABLE);
	j->class = (__u32)peer & PEER_CLASS;
	j->owner = peer >> 32;
	if (j->ruleset == RULESET_OPEN)
		return settle(j, ACTION_ALLOW, REASON_OPEN);
	if (dir == DIRECTION_EGRESS &&
	    ((__u32)peer & (PEER_SERVICE | PEER_NODE)) &&
	    !(how & HOW_TRANSLATED)) {
		j->class = peer;
		return settle(j, ACTION_DENY, REASON_NONE);
	}
	return judge_class(j, peer, dir, at);
}

/*
 * The verdict of the ruleset on a packet, in scratch->judgement. One to a
 * marked peer is not settled: it has no reason. The epoch is read before the
 * tables, so what is remembered of them is never younger than it says. Probes
 * leave that alone: packets interrupt them.
 */
__noinline int judge(__u32 ruleset_id, __u32 how)
{
	__u32 dir = HOW_DIR(how), epoch = current_epoch(), at, kind;
	struct scratch *s = scratch_get();
	const struct flow_key *key;
	struct judged *last;
	struct judgement *j;

	if (!s)
		return ACTION_DENY;
	key = HOW_QUOTED(how) ? &s->quoted.key : &s->packet.key;
	j = &s->judgement;
	j->rule = 0;
	j->class = 0;
	j->owner = 0;
	j->ruleset = ruleset_id;
	if (HOW_FROM_NODE(how))
		return settle(j, ACTION_ALLOW, REASON_NODE);
	if (address_equal(&key->local, &key->peer))
		return settle(j, ACTION_ALLOW, REASON_SELF);
	if ((how & HOW_HAIRPIN) && peer_is_node(how))
		return settle(j, ACTION_ALLOW, REASON_SELF);
	at = coordinate(key, how);
	kind = (how & HOW_KIND) << 24 | at << 1 | dir;
	last = judged_at(s, &key->peer, ruleset_id, kind);
	if (!(how & HOW_AHEAD) && last->answer.ruleset == ruleset_id &&
	    ruleset_id && last->at == kind && last->epoch == epoch &&
	    address_equal(&last->peer, &key->peer)) {
		*j = last->answer;
		return j->action & 1;
	}
	judge_peer(s, &key->peer, how, at);
	if (!(how & HOW_AHEAD) && j->reason != REASON_TABLE) {
		address_copy(&last->peer, &key->peer);
		last->at = kind;
		last->epoch = epoch;
		last->answer = *j;
	}
	return j->action & 1;
}

/*
 * The verdict of the ruleset on the first packet of a flow, in
 * scratch->judgement. Two calls beside and not in each other: old kernels have
 * 512 bytes of stack for all of them.
 */
static __always_inline void judge_first(struct judgement *j, __u32 ruleset_id,
					__u32 how)
{
	judge(ruleset_id, how);
	if (j->reason == REASON_NONE)
		judge_service(how);
}
