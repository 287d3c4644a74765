/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Copyright The podgate Authors */
/* From the interface of a hook to its gate. */
#pragma once

#include <bpf/bpf_helpers.h>

#include "config.h"
#include "maps.h"
#include "packet.h"

/* A gate's slot and a direction in one scalar. */
#define WHERE(slot, dir) ((slot) << 1 | (dir))
#define WHERE_SLOT(where) ((where) >> 1)
#define WHERE_DIR(where) ((where) & 1)

#define NO_SLOT 0xffffffffU

/* A gate's slot as skb->tc_index has it. */
#define TAG(slot) ((slot) < TAG_SLOT ? (slot) + 1 : 0)

/* The slot of a gate whose first slot another one has. */
__noinline __u32 displaced_slot(__u32 ifindex)
{
	for (__u32 i = 1; i < GATE_PROBES; i++) {
		__u32 slot = (ifindex + i) & gate_mask;
		struct gate *gate = bpf_map_lookup_elem(&gates, &slot);

		if (gate && gate->ifindex == ifindex)
			return slot;
	}
	return NO_SLOT;
}

static __always_inline struct gate *find_gate(__u32 ifindex, __u32 *slot)
{
	struct gate *gate;

	*slot = ifindex & gate_mask;
	gate = bpf_map_lookup_elem(&gates, slot);
	if (gate && gate->ifindex == ifindex)
		return gate;
	*slot = displaced_slot(ifindex);
	return bpf_map_lookup_elem(&gates, slot);
}

static __always_inline struct gate *gate_at(__u32 where)
{
	__u32 slot = WHERE_SLOT(where);

	return bpf_map_lookup_elem(&gates, &slot);
}

static __always_inline __u64 gate_rulesets(const struct gate *gate)
{
	return *(volatile const __u64 *)&gate->rulesets;
}

static __always_inline __u32 ruleset_of(__u64 rulesets, __u32 dir)
{
	return dir == DIRECTION_EGRESS ? rulesets >> 32 : (__u32)rulesets;
}

static __always_inline __u32 current_epoch(void)
{
	__u32 zero = 0;
	struct state *s = bpf_map_lookup_elem(&state, &zero);

	return s ? *(volatile __u32 *)&s->epoch : 0;
}

static __always_inline __u32 services_mode(void)
{
	__u32 zero = 0;
	struct state *s = bpf_map_lookup_elem(&state, &zero);

	return s ? *(volatile __u32 *)&s->services : SERVICES_NONE;
}

/* Does the address belong to the endpoint? Most have one of each family. */
static __always_inline bool is_own(const struct gate *gate,
				   const struct address *a)
{
	struct source key = { .endpoint = gate->endpoint };

	if (address_is_zero(a))
		return false;
	if (address_equal(a, &gate->own[0]) || address_equal(a, &gate->own[1]))
		return true;
	address_copy(&key.address, a);
	return bpf_map_lookup_elem(&sources, &key) != NULL;
}
