//go:build ignore

// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
// Copyright The podgate Authors
/*
 * What the datapath is measured against: no work, one LRU hash hit, one
 * evicting LRU insert, and one after a lookup; with keys and values of the
 * flows map.
 */
#include <linux/if_ether.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_endian.h>

#include "../../bpf/include/types.h"
#include <bpf/bpf_helpers.h>

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* Set up like flows in bpf/include/maps.h. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 262144);
	__type(key, struct flow_key);
	__type(value, struct flow);
} entries SEC(".maps");

/* What renew hands packets to, at 0. */
struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} next SEC(".maps");

__u32 last_ports;
/* Added for each packet: 1 changes the source port, 1 << 16 the other. */
__u32 step = 1;

/* The port words of a frame without VLAN tags, options or extensions. */
static __always_inline __u32 *ports_of(struct __sk_buff *skb)
{
	void *data = (void *)(long)skb->data;
	void *end = (void *)(long)skb->data_end;
	struct ethhdr *eth = data;
	__u32 *ports = data + ETH_HLEN + sizeof(struct iphdr);

	if (data + ETH_HLEN > end)
		return NULL;
	if (eth->h_proto == bpf_htons(ETH_P_IPV6))
		ports = data + ETH_HLEN + sizeof(struct ipv6hdr);
	return (void *)(ports + 1) > end ? NULL : ports;
}

SEC("tc")
int empty(struct __sk_buff *skb)
{
	return TC_ACT_UNSPEC;
}

/* The entry was made by user space. */
SEC("tc")
int hit(struct __sk_buff *skb)
{
	struct flow_key key = {};

	return bpf_map_lookup_elem(&entries, &key) ? TC_ACT_UNSPEC :
						     TC_ACT_SHOT;
}

static __always_inline int enter(struct __sk_buff *skb, bool look)
{
	struct flow_key key = { .endpoint = 1 };
	struct flow value = {};
	__u32 *ports = ports_of(skb);

	if (!ports)
		return TC_ACT_SHOT;
	key.local_port = *ports;
	key.peer_port = *ports >> 16;
	if (look && bpf_map_lookup_elem(&entries, &key))
		return TC_ACT_SHOT;
	return bpf_map_update_elem(&entries, &key, &value, BPF_ANY) ?
		       TC_ACT_SHOT :
		       TC_ACT_UNSPEC;
}

SEC("tc")
int insert(struct __sk_buff *skb)
{
	return enter(skb, false);
}

/* Nothing in the packet says that the flow is new. */
SEC("tc")
int miss(struct __sk_buff *skb)
{
	return enter(skb, true);
}

/*
 * A test run repeats one packet. This makes it the first of another flow each
 * time, for four billion times.
 */
SEC("tc")
int renew(struct __sk_buff *skb)
{
	__u32 *ports = ports_of(skb);

	if (!ports)
		return TC_ACT_SHOT;
	last_ports += step;
	*ports = last_ports;
	bpf_tail_call(skb, &next, 0);
	return TC_ACT_SHOT;
}
