//go:build ignore

// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
// Copyright The podgate Authors
/*
 * The program that judges packets to Services after kube-proxy has chosen the
 * backend: a netfilter link at FORWARD and LOCAL_IN, behind DNAT and before
 * filters. It is an object of its own, since kernels before 6.4 cannot have it.
 *
 * from_pod has seen each packet before. Its tag says which pod sent it, so that
 * no interface or address needs to be believed, and that this one is left to
 * judge. When another program has cleared the tag the source address tells.
 */
#include "include/types.h"

#include "include/judge.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* <linux/netfilter.h> */
#define NF_DROP 0
#define NF_ACCEPT 1

/* The kernel's own, as far as they are read. */
struct sk_buff {
	unsigned int len;
	__u16 tc_index;
	unsigned long _nfct;
} __attribute__((preserve_access_index));

struct nf_hook_state;

struct bpf_nf_ctx {
	const struct nf_hook_state *state;
	struct sk_buff *skb;
} __attribute__((preserve_access_index));

/* enum ip_conntrack_info, in the lowest bits of skb->_nfct. */
#define CT_INFO 7
#define CT_ESTABLISHED_REPLY 3
#define CT_RELATED_REPLY 4

extern int bpf_dynptr_from_skb(struct sk_buff *skb, __u64 flags,
			       struct bpf_dynptr *ptr) __ksym;
extern void *bpf_dynptr_slice(const struct bpf_dynptr *ptr, __u32 offset,
			      void *buffer, __u32 size) __ksym;

/* Beside the slot of a gate. */
#define SLOT_OTHER (~0U)       /* of no endpoint */
#define SLOT_UNKNOWN (~0U - 1) /* its claim could not be read */

/* Where the upper layer is, or why it is not known. */
#define L4_NONE 0xffff0000U
/* Beyond any chain of EXTENSIONS_MAX headers. */
#define L4_MASK 0x7fff

/*
 * The addresses and protocol of a packet whose data start at its IP header. The
 * result is the offset of the upper layer, or a reason in L4_NONE.
 */
static __always_inline __u32 read_v6(struct bpf_dynptr *data,
				     struct flow_key *key)
{
	__u8 buffer[40], extension[8], next, *h;
	__u32 at = sizeof(struct ipv6hdr);
	struct ipv6hdr *ip;

	ip = bpf_dynptr_slice(data, 0, buffer, sizeof(*ip));
	if (!ip)
		return L4_NONE | REASON_MALFORMED;
	__builtin_memcpy(&key->local, &ip->saddr, 16);
	__builtin_memcpy(&key->peer, &ip->daddr, 16);
	next = ip->nexthdr;
	for (int i = 0; i <= EXTENSIONS_MAX; i++) {
		if (next != IPPROTO_HOPOPTS && next != IPPROTO_DSTOPTS &&
		    next != IPPROTO_ROUTING && next != IPPROTO_FRAGMENT &&
		    next != NEXTHDR_AUTH) {
			key->protocol = next;
			return at;
		}
		h = bpf_dynptr_slice(data, at, extension, sizeof(extension));
		if (!h)
			return L4_NONE | REASON_MALFORMED;
		if (next == IPPROTO_FRAGMENT) {
			if (h[2] || (h[3] & 0xf8))
				return L4_NONE | REASON_FRAGMENT;
			at += 8;
		} else if (next == NEXTHDR_AUTH) {
			at += ((__u32)h[1] + 2) * 4;
		} else {
			at += ((__u32)h[1] + 1) * 8;
		}
		/* So that the verifier finds all ways here alike. */
		asm volatile("%0 &= %1" : "+r"(at) : "i"(L4_MASK));
		next = h[0];
	}
	return L4_NONE | REASON_EXTENSIONS;
}

static __always_inline __u32 read_v4(struct iphdr *ip, struct flow_key *key)
{
	address_v4(&key->local, ip->saddr);
	address_v4(&key->peer, ip->daddr);
	key->protocol = ip->protocol;
	if (ip->frag_off & bpf_htons(IP_OFFSET))
		return L4_NONE | REASON_FRAGMENT;
	return (*(__u8 *)ip & 0xf) * 4;
}

/*
 * The slot of the gate whose endpoint has the source address of the packet in
 * scratch, or a SLOT_. The claim may be another's while its element is
 * recycled: the gate knows.
 */
__noinline __u32 sender(void)
{
	struct scratch *s = scratch_get();

	if (!s)
		return SLOT_UNKNOWN;
	for (int i = 0; i < 3; i++) {
		struct claim *claim =
			bpf_map_lookup_elem(&claims, &s->packet.key.local);
		struct gate *gate;
		__u32 slot;

		if (!claim || !claim->endpoint)
			return SLOT_OTHER;
		slot = claim->gate;
		gate = bpf_map_lookup_elem(&gates, &slot);
		if (gate && gate->endpoint == claim->endpoint &&
		    is_own(gate, &s->packet.key.local))
			return slot;
	}
	return SLOT_UNKNOWN;
}

/*
 * Is the source address of the packet in scratch one that the pod may use? Where
 * nodes share a kernel the tag may be of another node's pod, and name any slot.
 */
__noinline int is_senders(__u32 slot)
{
	struct gate *gate = bpf_map_lookup_elem(&gates, &slot);
	struct scratch *s = scratch_get();

	return s && gate && gate->endpoint &&
	       (!(gate->flags & GATE_ANTI_SPOOF) ||
		is_own(gate, &s->packet.key.local));
}

/* Has from_pod let through the flow, not of a Service, of what is in scratch? */
__noinline int is_judged(__u32 slot)
{
	struct gate *gate = bpf_map_lookup_elem(&gates, &slot);
	struct scratch *s = scratch_get();
	struct flow *f;

	if (!s || !gate)
		return 0;
	f = bpf_map_lookup_elem(&flows, &s->packet.key);
	return f && !(f->flags & FLOW_SERVICE) &&
	       f->valid == flow_valid(flow_identity(&s->packet.key),
				      gate_rulesets(gate), current_epoch());
}

/* The flow before translation of the packet in scratch, if it is known. */
static __always_inline struct flow *before_nat(const struct handover *h,
					       const struct flow_key *key)
{
	struct flow *f;

	if (h->tick != bpf_jiffies64() || h->key.endpoint != key->endpoint ||
	    h->key.local_port != key->local_port ||
	    h->key.protocol != key->protocol ||
	    !address_equal(&h->key.local, &key->local))
		return NULL;
	f = bpf_map_lookup_elem(&flows, &h->key);
	return f && (f->flags & FLOW_SERVICE) &&
			       f->identity == flow_identity(&h->key) ?
		       f :
		       NULL;
}

/* As emit, with the frontend if it is known. */
static __always_inline void emit_service(struct scratch *s, __u32 type,
					 __u32 length, __u32 ifindex,
					 const struct flow_key *before)
{
	struct service_event *e;

	if (type == EVENT_DROP && repeats(s, DIRECTION_EGRESS))
		return;
	e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);
	if (!e) {
		lose();
		return;
	}
	fill(&e->event, s, length, ifindex, type, DIRECTION_EGRESS, tick_ns(s));
	__builtin_memset(&e->frontend, 0,
			 sizeof(*e) - offsetof(struct service_event, frontend));
	if (before && flow_identity(before) != flow_identity(&s->packet.key)) {
		address_copy(&e->frontend, &before->peer);
		e->frontend_port = before->peer_port;
	}
	submit(s, e);
}

/* Stamps the flow before translation with the verdict on its backend. */
static __always_inline void stamp(struct scratch *s, struct flow *f,
				  const struct flow_key *before, __u8 verdict,
				  __u64 rulesets, __u32 epoch)
{
	__u64 identity = flow_identity(&s->packet.key);
	struct judgement *j = &s->judgement;
	struct backend b = {};

	if (f->translated != identity) {
		address_copy(&b.address, &s->packet.key.peer);
		b.port = s->packet.key.peer_port;
		if (identity != flow_identity(before))
			bpf_map_update_elem(&backends, before, &b, BPF_ANY);
		f->translated = identity;
	}
	f->verdict = verdict;
	f->rule = j->rule;
	f->ruleset = j->ruleset;
	f->class = j->class;
	f->owner = j->owner;
	f->reason = j->reason;
	/* The entry may be another key's by now. */
	f->valid = flow_valid(flow_identity(before), rulesets, epoch);
}

/*
 * The flow before translation is refused. One that has just begun leaves no
 * entry, like any other that is: it must not cost others theirs.
 */
static __always_inline void refuse_flow(struct flow *f,
					const struct flow_key *before)
{
	f->verdict = VERDICT_DENIED;
	if (f->translated)
		return;
	f->valid = 0;
	if (f->state == FLOW_NEW && f->packets[DIRECTION_EGRESS] == 1 &&
	    !f->packets[DIRECTION_INGRESS])
		bpf_map_delete_elem(&flows, before);
}

/*
 * Judges the packet in scratch, as its gate stands now. Anything that keeps a
 * packet from being read is given as a reason.
 */
__noinline int judge_after(__u32 slot, __u32 length, __u32 reason)
{
	struct gate *gate = bpf_map_lookup_elem(&gates, &slot);
	__u32 epoch = current_epoch(), zero = 0;
	struct scratch *s = scratch_get();
	struct flow_key *before = NULL;
	struct flow *f = NULL;
	struct judgement *j;
	struct handover *h;
	bool audit, denied;
	__u64 rulesets;

	h = bpf_map_lookup_elem(&handovers, &zero);
	if (!s || !gate || !h)
		return NF_DROP;
	j = &s->judgement;
	rulesets = gate_rulesets(gate);
	audit = gate->flags & GATE_AUDIT;
	if (reason) {
		__builtin_memset(j, 0, sizeof(*j));
		j->reason = reason;
		j->ruleset = ruleset_of(rulesets, DIRECTION_EGRESS);
	} else {
		judge(ruleset_of(rulesets, DIRECTION_EGRESS),
		      HOW(DIRECTION_EGRESS, false, false, 0) | HOW_TRANSLATED);
		f = before_nat(h, &s->packet.key);
		if (f)
			before = &h->key;
	}
	denied = j->action == ACTION_DENY;
	count(length, slot, DIRECTION_EGRESS, !denied || audit);
	if (denied && !audit) {
		emit_service(s, EVENT_DROP, length, gate->ifindex, before);
		count_drop(length, j->reason, DIRECTION_EGRESS);
		if (j->rule)
			count_rule(length, j->rule);
		if (f)
			refuse_flow(f, &h->key);
		return NF_DROP;
	}
	if (denied ? !f || !f->translated : f && !f->translated)
		emit_service(s, denied ? EVENT_AUDIT : EVENT_FLOW, length,
			     gate->ifindex, before);
	if (!denied && j->rule)
		count_rule(length, j->rule);
	if (f)
		stamp(s, f, &h->key, denied ? VERDICT_AUDITED : VERDICT_ALLOWED,
		      rulesets, epoch);
	return NF_ACCEPT;
}

/* The rest of what judge_after looks at in scratch. */
static __always_inline int judge_slowly(struct bpf_dynptr *data, __u32 l4,
					__u32 slot, __u32 length)
{
	struct scratch *s = scratch_get();
	__u8 buffer[14], *tcp;
	__u32 reason = 0;
	int verdict;

	if (!s)
		return NF_DROP;
	s->packet.ethertype =
		address_is_v4(&s->packet.key.local) ? ETH_P_IP : ETH_P_IPV6;
	s->packet.shape = SHAPE_FLOW;
	s->packet.tcp_flags = 0;
	s->packet.icmp_type = 0;
	s->packet.icmp_code = 0;
	if (l4 >= L4_NONE) {
		reason = l4 & ~L4_NONE;
	} else if (s->packet.key.protocol == IPPROTO_TCP) {
		tcp = bpf_dynptr_slice(data, l4, buffer, sizeof(buffer));
		if (tcp)
			s->packet.tcp_flags = tcp[13];
		else
			reason = REASON_MALFORMED;
	}
	verdict = judge_after(slot, length, reason);
	/* For the verifier, which does not know; the compiler does. */
	asm volatile("%0 &= 1" : "+r"(verdict));
	return verdict;
}

/* The common shapes, read as in parse_fast; the rest takes the slow path. */
static __always_inline bool read_fast(struct bpf_dynptr *data,
				      struct flow_key *key, __u32 endpoint)
{
	__u8 buffer[sizeof(struct ipv6hdr) + 4], protocol;
	struct iphdr *ip;
	__be16 *ports;

	ip = bpf_dynptr_slice(data, 0, buffer, sizeof(*ip) + 4);
	if (!ip)
		return false;
	if (*(__u8 *)ip == 0x45) {
		if (ip->frag_off & bpf_htons(IP_OFFSET))
			return false;
		address_v4(&key->local, ip->saddr);
		address_v4(&key->peer, ip->daddr);
		protocol = ip->protocol;
		ports = (__be16 *)(ip + 1);
	} else {
		struct ipv6hdr *ip6;

		ip6 = bpf_dynptr_slice(data, 0, buffer, sizeof(*ip6) + 4);
		if (!ip6 || *(__u8 *)ip6 >> 4 != 6)
			return false;
		__builtin_memcpy(&key->local, &ip6->saddr, 16);
		__builtin_memcpy(&key->peer, &ip6->daddr, 16);
		protocol = ip6->nexthdr;
		ports = (__be16 *)(ip6 + 1);
	}
	key_words(key, endpoint, bpf_ntohs(ports[0]), bpf_ntohs(ports[1]),
		  protocol);
	return true;
}

/*
 * Is it what was allowed of the flow that from_pod has just deferred? The
 * identity is that of the whole key with the endpoint. The port, which a pod
 * can choose to make identities meet, is compared.
 */
static __always_inline bool is_allowed(struct bpf_dynptr *data,
				       const struct handover *h, __u32 tag,
				       __u32 length)
{
	struct flow_key key;

	if (!h->translated || h->slot != tag - 1 || h->tick != bpf_jiffies64())
		return false;
	if (!read_fast(data, &key, h->key.endpoint) ||
	    key.local_port != h->key.local_port ||
	    flow_identity(&key) != h->translated)
		return false;
	count(length, h->slot, DIRECTION_EGRESS, true);
	if (h->rule)
		count_rule(length, h->rule);
	return true;
}

SEC("netfilter")
int after_nat(struct bpf_nf_ctx *ctx)
{
	struct sk_buff *skb = ctx->skb;
	__u32 length, slot, l4, ct, zero = 0, tag = skb->tc_index;
	struct bpf_dynptr data;
	struct flow_key *key;
	struct handover *h;
	struct scratch *s;
	struct gate *gate;
	struct iphdr *ip;
	__u8 buffer[20];
	__be16 *ports;

	if (tag & TAG_JUDGED)
		return NF_ACCEPT;
	/* What is left to after_nat goes the way of its connection. */
	ct = skb->_nfct & CT_INFO;
	if (!tag && (ct == CT_ESTABLISHED_REPLY || ct == CT_RELATED_REPLY))
		return NF_ACCEPT;
	if (bpf_dynptr_from_skb(skb, 0, &data))
		return NF_DROP;
	length = skb->len + ETH_HLEN;
	h = bpf_map_lookup_elem(&handovers, &zero);
	if (h && tag && is_allowed(&data, h, tag, length))
		return NF_ACCEPT;

	s = scratch_get();
	ip = bpf_dynptr_slice(&data, 0, buffer, sizeof(buffer));
	if (!s || !ip)
		return NF_DROP;
	key = &s->packet.key;
	key->protocol = 0;
	l4 = *(__u8 *)ip >> 4 == 6 ? read_v6(&data, key) : read_v4(ip, key);
	/* from_pod leaves nothing else. */
	if (l4 < L4_NONE && !is_mapped(key->protocol))
		return tag ? NF_DROP : NF_ACCEPT;

	slot = tag - 1;
	if (!tag || !is_senders(slot))
		slot = sender();
	if (slot == SLOT_OTHER)
		return NF_ACCEPT;
	gate = bpf_map_lookup_elem(&gates, &slot);
	if (!gate)
		return NF_DROP;
	ports = l4 < L4_NONE ? bpf_dynptr_slice(&data, l4, buffer, 4) : NULL;
	if (!ports && l4 < L4_NONE)
		l4 = L4_NONE | REASON_MALFORMED;
	key_words(key, gate->endpoint, ports ? bpf_ntohs(ports[0]) : 0,
		  ports ? bpf_ntohs(ports[1]) : 0, key->protocol);
	if (!tag && is_judged(slot))
		return NF_ACCEPT;
	return judge_slowly(&data, l4, slot, length);
}
