/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Copyright The podgate Authors */
/*
 * Later fragments have no ports. They get those of their first fragment, once
 * that was allowed; without one they are dropped where policy isolates.
 */
#pragma once

#include <bpf/bpf_helpers.h>

#include "conntrack.h"
#include "gate.h"

static __always_inline void fragment_key_of(struct fragment_key *key,
					    const struct packet *p, __u32 dir)
{
	address_copy(&key->local, &p->key.local);
	address_copy(&key->peer, &p->key.peer);
	key->endpoint = p->key.endpoint;
	key->id = p->fragment_id;
	key->protocol = p->ethertype == ETH_P_IP ? p->key.protocol : 0;
	key->direction = dir;
}

static __always_inline __u64 fragment_identity(const struct fragment_key *key)
{
	return flow_identity((const struct flow_key *)key);
}

/* The first fragment, in scratch, was allowed: keep its ports. */
__noinline int remember_fragment(__u32 dir)
{
	struct scratch *s = scratch_get();
	struct fragment_key key = {};
	struct fragment value = {};

	if (!s)
		return 0;
	value.local_port = s->packet.key.local_port;
	value.peer_port = s->packet.key.peer_port;
	value.protocol = s->packet.key.protocol;
	value.expires = bpf_jiffies64() + fragment_timeout;
	fragment_key_of(&key, &s->packet, dir);
	value.identity = fragment_identity(&key);
	return bpf_map_update_elem(&fragments, &key, &value, BPF_ANY);
}

/* Gives the later fragment in scratch the ports of its first one. */
__noinline int recall_fragment(__u32 dir)
{
	struct scratch *s = scratch_get();
	struct fragment_key key = {};
	struct fragment *f;

	if (!s)
		return 0;
	fragment_key_of(&key, &s->packet, dir);
	f = bpf_map_lookup_elem(&fragments, &key);
	if (!f || f->identity != fragment_identity(&key) ||
	    (__s64)(bpf_jiffies64() - f->expires) > 0)
		return 0;
	s->packet.key.local_port = f->local_port;
	s->packet.key.peer_port = f->peer_port;
	s->packet.key.protocol = f->protocol;
	s->packet.shape = SHAPE_FLOW;
	return 1;
}
