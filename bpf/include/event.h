/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Copyright The podgate Authors */
/* Counters and ring-buffer records. */
#pragma once

#include <bpf/bpf_helpers.h>

#include "conntrack.h"
#include "maps.h"
#include "packet.h"

/* Bytes that may wait in the ring before its consumer is woken. */
#define EVENTS_WAKE 65536
/* A CPU looks whether to wake it at every so many records. */
#define EVENTS_LOOK 32

static __always_inline void count(__u32 length, __u32 slot, __u32 dir,
				  bool allowed)
{
	struct endpoint_counters *c =
		bpf_map_lookup_elem(&endpoint_counters, &slot);

	if (!c)
		return;
	if (allowed) {
		c->allowed_packets[dir & 1]++;
		c->allowed_bytes[dir & 1] += length;
	} else {
		c->dropped_packets[dir & 1]++;
		c->dropped_bytes[dir & 1] += length;
	}
}

static __always_inline void count_rule(__u32 length, __u32 rule)
{
	struct counter *c = bpf_map_lookup_elem(&rule_counters, &rule);

	if (c) {
		c->packets++;
		c->bytes += length;
	}
}

static __always_inline void count_drop(__u32 length, __u8 reason, __u8 dir)
{
	__u32 index = (__u32)reason * 2 + dir;
	struct counter *c = bpf_map_lookup_elem(&drop_counters, &index);

	if (c) {
		c->packets++;
		c->bytes += length;
	}
}

/*
 * The time to within a tick of the kernel's timer: all drops that a CPU sees
 * in one tick share the clock that the first of them paid for.
 */
static __always_inline __u64 tick_ns(struct scratch *s)
{
	__u64 now = bpf_jiffies64();

	if (s->tick != now) {
		s->tick = now;
		s->tick_ns = bpf_ktime_get_ns();
	}
	return s->tick_ns;
}

/*
 * Is the drop in scratch the same as the one before it, within a tick? A flood
 * of one kind of packet is told once a tick, and counted all the same: it must
 * not push what others did out of the ring.
 */
static __always_inline bool repeats(struct scratch *s, __u32 dir)
{
	__u64 identity =
		flow_identity(&s->packet.key) +
		((__u64)s->judgement.reason << 1 | dir) * 0x9fb21c651e98df25ULL;
	bool same = s->tick == bpf_jiffies64() && s->dropped == identity;

	s->dropped = identity;
	return same;
}

/* The ring had no room for a record. */
static __always_inline void lose(void)
{
	__u32 zero = 0;
	__u64 *lost = bpf_map_lookup_elem(&lost_events, &zero);

	if (lost)
		(*lost)++;
}

/* Writes down what scratch holds. */
static __always_inline void fill(struct event *e, const struct scratch *s,
				 __u32 length, __u32 ifindex, __u32 type,
				 __u32 dir, __u64 now_ns)
{
	const struct judgement *j = &s->judgement;
	const struct packet *p = &s->packet;

	e->time_ns = now_ns;
	address_copy(&e->local, &p->key.local);
	address_copy(&e->peer, &p->key.peer);
	e->endpoint = p->key.endpoint;
	e->ifindex = ifindex;
	e->rule = j->rule;
	e->ruleset = j->ruleset;
	e->class = j->class;
	e->length = length;
	e->local_port = p->key.local_port;
	e->peer_port = p->key.peer_port;
	e->ethertype = p->ethertype;
	e->type = type;
	e->direction = dir;
	e->verdict = type == EVENT_FLOW ? VERDICT_ALLOWED :
		     type == EVENT_DROP ? VERDICT_DENIED :
					  VERDICT_AUDITED;
	e->reason = j->reason;
	e->protocol = p->key.protocol;
	e->tcp_flags = p->tcp_flags;
	e->icmp_type = p->icmp_type;
	e->icmp_code = p->icmp_code;
	e->reserved[0] = 0;
	e->reserved[1] = 0;
}

static __always_inline void submit(struct scratch *s, void *e)
{
	__u64 flags = BPF_RB_NO_WAKEUP;

	if (!(++s->records % EVENTS_LOOK) &&
	    bpf_ringbuf_query(&events, BPF_RB_AVAIL_DATA) > EVENTS_WAKE)
		flags = BPF_RB_FORCE_WAKEUP;
	bpf_ringbuf_submit(e, flags);
}

/*
 * Records what scratch holds. A forced wake-up costs fifty times the record
 * itself, so the consumer polls and is woken only when much has gathered, and
 * never for each record: it may be too slow for all of them.
 */
__noinline int emit(struct __sk_buff *skb, __u32 type, __u32 dir)
{
	struct scratch *s = scratch_get();
	struct event *e;

	if (!s || (type == EVENT_DROP && repeats(s, dir)))
		return 0;
	e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);
	if (!e) {
		lose();
		return 0;
	}
	fill(e, s, skb->len, skb->ifindex, type, dir, tick_ns(s));
	submit(s, e);
	return 0;
}
