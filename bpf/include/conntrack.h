/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Copyright The podgate Authors */
/*
 * Flows: lookup, life and revocation. An entry is trusted only while
 * flow->valid says that it is this key's, judged under the rulesets and the
 * epoch of now; anything else is judged again.
 */
#pragma once

#include <bpf/bpf_helpers.h>

#include "config.h"
#include "maps.h"
#include "packet.h"

/*
 * Multilinear hash of the key (odd 64-bit constants): independent
 * multiplications, a few cycles. It guards against elements recycled under a
 * reader, not against an adversary: the map compares whole keys.
 */
static __always_inline __u64 flow_identity(const struct flow_key *key)
{
	const __u64 *w = (const __u64 *)key;

	return w[0] * 0x9e3779b97f4a7c15ULL + w[1] * 0xbf58476d1ce4e5b9ULL +
	       w[2] * 0x94d049bb133111ebULL + w[3] * 0xd6e8feb86659fd93ULL +
	       w[4] * 0xa0761d6478bd642fULL + w[5] * 0xe7037ed1a0b428dbULL;
}

/* What flow->valid is for a flow judged under these rulesets and epoch. */
static __always_inline __u64 flow_valid(__u64 identity, __u64 rulesets,
					__u32 epoch)
{
	return identity + rulesets * 0x8ebc6af09c88c6e3ULL +
	       ((__u64)epoch + 1) * 0x589965cc75374cc3ULL;
}

static __always_inline __u8 flow_kind_of(__u8 protocol)
{
	switch (protocol) {
	case IPPROTO_TCP:
		return FLOW_TCP;
	case IPPROTO_UDP:
		return FLOW_UDP;
	case IPPROTO_SCTP:
		return FLOW_SCTP;
	case IPPROTO_ICMP:
	case IPPROTO_ICMPV6:
		return FLOW_ICMP;
	}
	return FLOW_OTHER;
}

static __always_inline __u64 flow_timeout(__u8 kind, __u8 state)
{
	return flow_timeouts[(kind * FLOW_STATES + state) &
			     (FLOW_TIMEOUTS - 1)];
}

static __always_inline bool flow_expired(const struct flow *f, __u64 now)
{
	return (__s64)(now - f->expires) > 0;
}

static __always_inline void flow_touch(struct flow *f, __u64 now)
{
	f->expires = now + flow_timeout(f->kind, f->state);
}

static __always_inline bool tcp_opens(__u8 flags)
{
	return (flags & (TCP_SYN | TCP_ACK | TCP_RST)) == TCP_SYN;
}
