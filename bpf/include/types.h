/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Copyright The podgate Authors */
/*
 * Keys, values and enums of the pinned maps. Everything here is BTF that
 * bpftool prints and bpf2go turns into Go: names are for readers. A change of
 * layout or meaning is a new ABI (PODGATE_ABI).
 */
#pragma once

#include <linux/bpf.h>
#include <linux/types.h>
#include <stdbool.h>
#include <stddef.h>

#define PODGATE_ABI 1

/* Always seen from the pod. */
enum direction {
	DIRECTION_INGRESS = 0,
	DIRECTION_EGRESS = 1,
};

enum action {
	ACTION_DENY = 0,
	ACTION_ALLOW = 1,
};

enum verdict {
	VERDICT_DENIED = 0,
	VERDICT_ALLOWED = 1,
	/* Let through, but would be denied if the endpoint were not audited. */
	VERDICT_AUDITED = 2,
};

/* Why a packet got its verdict. The first group allows, the rest denies. */
enum reason {
	REASON_NONE = 0,
	REASON_POLICY = 1,    /* a rule matched */
	REASON_DEFAULT = 2,   /* no rule matched: the ruleset's default */
	REASON_OPEN = 3,      /* no policy isolates this direction */
	REASON_NODE = 4,      /* to or from the pod's own node */
	REASON_SELF = 5,      /* from the pod to its own address */
	REASON_RELATED = 6,   /* ICMP error about a flow that is allowed */
	REASON_NEIGHBOUR = 7, /* ARP, neighbour discovery, multicast listener */
	REASON_CLOSED = 8,    /* the policy of the endpoint is not known yet */
	REASON_NO_GATE = 9,   /* hook on an interface that has no gate */
	REASON_SPOOFED_MAC = 10,
	REASON_SPOOFED_ADDRESS = 11,
	REASON_SPOOFED_NEIGHBOUR = 12, /* ARP or ND that speaks for others */
	REASON_OTHER_HOST = 13, /* flooded frame for another MAC address */
	REASON_MALFORMED = 14, /* truncated, or lengths and versions that lie */
	REASON_EXTENSIONS = 15,   /* too many IPv6 extension headers */
	REASON_SOURCE_ROUTE = 16, /* IPv4 source route or IPv6 routing header */
	REASON_FRAGMENT = 17, /* tiny first fragment, or first one not seen */
	/* On an isolated endpoint neither IP nor ARP, or tagged to a Service. */
	REASON_ETHERTYPE = 18,
	REASON_MARTIAN = 19, /* v4-mapped address on the wire */
	REASON_TABLE = 20,   /* a map was full or changed under the reader */
	/* Some backends of the Service are allowed, others not, or unknown. */
	REASON_SERVICE_MIXED = 21,
	REASON_SERVICE =
		22, /* allows: the backend is judged once it is known */
	REASON_COUNT = 23,
};

/* An IPv6 address, or an IPv4 address as ::ffff:a.b.c.d (RFC 4291 2.5.5.2). */
struct address {
	__u8 bytes[16];
} __attribute__((aligned(8)));

/* Rulesets enforced on one endpoint; read and written as one u64. */
struct enforcement {
	__u32 ingress;
	__u32 egress;
} __attribute__((aligned(8)));

/* Ruleset ids below RULESET_FIRST are not stored. Zero memory is closed. */
#define RULESET_CLOSED 0
#define RULESET_OPEN 1
#define RULESET_FIRST 2

enum gate_flags {
	GATE_ANTI_SPOOF = 1 << 0,
	GATE_AUDIT = 1 << 1,
};

/*
 * What the datapath needs of an endpoint. The table is open-addressed by
 * ifindex: a gate lives at ifindex & mask or one of the GATE_PROBES slots
 * after it. ifindex is written last and cleared first.
 */
struct gate {
	struct enforcement rulesets;
	__u32 ifindex;  /* host end of the veth; 0: free */
	__u32 endpoint; /* endpoint id, never reused */
	__u8 mac[6];    /* of the pod's end */
	__u16 flags;    /* enum gate_flags */
	/* Two of its addresses, which are in sources too, or zero. */
	struct address own[2];
	__u64 reserved;
};

#define GATE_PROBES 8

/* One CNI attachment: the key of an endpoint. */
struct attachment {
	char container_id[128];
	char ifname[16];
};

struct endpoint {
	__u32 id;
	__u32 gate;
	__u32 ifindex;
	__u8 mac[6];
	__u8 mode;   /* until the policy is known: 0 closed, 1 open */
	__u8 attach; /* 1 clsact, 2 tcx */
	__u16 flags; /* enum gate_flags */
	__u16 addresses_count;
	__u32 interfaces; /* of the attachment; 0: not known */
	__u64 created_ns; /* CLOCK_REALTIME */
	struct address addresses[16];
	char cni_ifname
		[16]; /* of the attachment; it may have further interfaces */
	char network[128];
	char netns[128];
	char pod_uid[64];
	char pod_namespace[64];
	char pod_name[256];
	char pod_key[320]; /* pods entry the gate follows */
	char labels[1024]; /* args.cni.labels as a JSON object */
};

/* Who holds an address. */
struct claim {
	struct attachment attachment;
	__u32 endpoint; /* 0: claimed at allocation, not gated yet */
	__u32 gate;
	__u64 created_ns; /* CLOCK_REALTIME */
};

/* An address an endpoint may send from. */
struct source {
	struct address address;
	__u32 endpoint;
	__u32 reserved;
};

/* A pod's identity: its UID, or namespace/name. */
struct pod_key {
	char id[320];
};

struct pod {
	struct enforcement rulesets;
	__u32 class; /* at an address that no block covers */
	__u16 owner;
	__u16 flags; /* enum gate_flags; only GATE_AUDIT is used */
	__u64 tag;   /* digest of the key: tells a value read while recycled */
};

#define PEER_NODE (1U << 31)
#define PEER_SERVICE (1U << 30)
#define PEER_CLASS (PEER_SERVICE - 1)

/* Class of an address; read and written as one u64. */
struct peer {
	/* PEER_NODE: this node's address; PEER_SERVICE: it has frontends */
	__u32 class;
	__u16 owner; /* digest of the owning pod, 0 if none */
	__u16 tag; /* fold of the address: tells a value read while recycled */
} __attribute__((aligned(8)));

/* Longest-prefix match; v4 prefixes are 96 bits longer. */
struct block_key {
	__u32 prefixlen;
	__u8 address[16];
};

struct join_key {
	__u32 pod;
	__u32 block;
};

struct digest {
	__u8 bytes[16];
};

/* Where a Service is reached: a cluster, external or node address. */
struct frontend_key {
	struct address address;
	__u16 port;
	__u8 protocol;
	__u8 reserved[5];
};

/* Read and written as one u64. */
struct frontend {
	__u32 service;
	__u16 tag; /* fold of the key: tells a value read while recycled */
	__u16 reserved;
} __attribute__((aligned(8)));

/* Backends that policy cannot tell apart. */
struct choice {
	__u32 class; /* PEER_NODE is set for addresses of this node */
	__u16 port;
	__u16 reserved;
};

#define SERVICE_CHOICES 16

/* Never changed once published: another set of choices is another number. */
struct service {
	__u32 id;
	__u32 count; /* of choices; over SERVICE_CHOICES: there are too many */
	struct choice choices[SERVICE_CHOICES];
	struct digest digest; /* of all that is here */
	char namespace[64];
	char name[256];
	char port_name[64];
};

enum ruleset_flags {
	RULESET_USED = 1 << 0,
	/* Classes without a cell use the cell of class 0. */
	RULESET_ANY_PEER = 1 << 1,
};

struct ruleset {
	struct digest digest;
	__u32 rule;     /* that attributes the default */
	__u32 policies; /* how many entries in ruleset_policies */
	__u8 direction;
	__u8 action; /* default */
	__u8 flags;  /* enum ruleset_flags */
	__u8 reserved[5];
};

struct cell_key {
	__u32 ruleset;
	__u32 class;
	__u32 chunk;
};

/* One verdict for protocol << 16 | port, both ends included. */
struct interval {
	__u32 first;
	__u32 last;
	__u32 rule;
	__u32 action;
};

#define CELL_INTERVALS 4
#define CELL_CHUNKS 16384

/* Sorted intervals, CELL_INTERVALS a chunk; never changed once published. */
struct cell {
	__u32 ruleset;
	__u32 class;
	__u32 chunk;
	__u16 chunks; /* of this cell, the same in each */
	__u16 count;  /* of intervals in this chunk */
	struct interval intervals[CELL_INTERVALS];
};

struct rule_info {
	struct digest digest;
	__u32 policy;
	__s32 index; /* -1: the isolation itself */
	__u8 direction;
	__u8 action;
	__u8 reserved[6];
	char text[192];
};

struct policy_info {
	struct digest digest;
	char uid[320];
	char kind[32];
	char namespace[64];
	char name[256];
};

struct ruleset_policy_key {
	__u32 ruleset;
	__u32 index;
};

enum flow_kind {
	FLOW_TCP = 0,
	FLOW_UDP = 1,
	FLOW_SCTP = 2,
	FLOW_ICMP = 3,
	FLOW_OTHER = 4,
	FLOW_KINDS = 5,
};

enum flow_state {
	FLOW_NEW = 0,         /* seen in one direction */
	FLOW_ESTABLISHED = 1, /* seen in both */
	FLOW_CLOSING = 2,     /* TCP FIN seen from one side */
	FLOW_CLOSED = 3,      /* TCP RST or FIN from both sides */
	FLOW_STATES = 4,
	/* Slots of the timeout table: a power of two of kinds. */
	FLOW_TIMEOUTS = 32,
};

enum flow_flags {
	FLOW_NODE = 1 << 0,     /* opened by the pod's own node */
	FLOW_VERIFIED = 1 << 1, /* the local address is the endpoint's */
	FLOW_FIN_INGRESS = 1 << 2,
	FLOW_FIN_EGRESS = 1 << 3,
	FLOW_RTT = 1 << 4,     /* rtt_us is measured */
	FLOW_SERVICE = 1 << 5, /* judged again after each translation */
	FLOW_HAIRPIN = 1 << 6, /* the pod's own, over a Service */
};

/*
 * Oriented by the pod, so both hooks make the same key. For ICMP echo the
 * side that asks has the identifier as port, the other side 0.
 */
struct flow_key {
	__u32 endpoint;
	__u16 local_port;
	__u16 peer_port;
	struct address local;
	struct address peer;
	__u8 protocol;
	__u8 reserved[7];
};

struct flow {
	/* identity + what it was judged under: one compare on the fast path */
	__u64 valid;
	__u64 identity; /* of the key: tells a value read while recycled */
	__u64 expires;  /* jiffies */
	/* of a Service's: identity with the backend that was allowed, or 0 */
	__u64 translated;
	__u64 packets[2]; /* by direction */
	__u64 bytes[2];
	__u64 created_ns; /* CLOCK_MONOTONIC */
	__u32 rule;
	__u32 ruleset;
	__u32 class;
	__u32 rtt_us; /* of the TCP handshake, as the hook saw it */
	__u16 owner;
	__u8 direction; /* of the first packet */
	__u8 kind;      /* enum flow_kind */
	__u8 state;     /* enum flow_state */
	__u8 flags;     /* enum flow_flags */
	__u8 verdict;   /* enum verdict */
	__u8 reason;    /* enum reason */
};

/* What a flow of a Service was translated to, when it was allowed. */
struct backend {
	struct address address;
	__u16 port;
	__u16 reserved[3];
};

struct fragment_key {
	struct address local;
	struct address peer;
	__u32 endpoint;
	__u32 id;
	__u8 protocol; /* IPv4: identifiers are per protocol (RFC 791 3.2) */
	__u8 direction;
	__u8 reserved[6];
};

/* Ports of the first fragment of a datagram that was allowed. */
struct fragment {
	__u64 identity; /* of the key */
	__u64 expires;  /* jiffies */
	__u16 local_port;
	__u16 peer_port;
	__u8 protocol; /* of the upper layer */
	__u8 reserved[3];
};

struct neighbour_key {
	struct address address;
	__u32 endpoint;
	__u32 reserved;
};

/* It has spoken to the endpoint from the same link (RFC 4861). */
struct neighbour {
	__u64 identity; /* of the key */
	__u64 expires;  /* jiffies */
};

enum event_type {
	EVENT_FLOW = 1, /* first packet of a flow */
	EVENT_DROP = 2,
	EVENT_AUDIT = 3, /* would be dropped if not audited */
};

struct event {
	__u64 time_ns; /* CLOCK_MONOTONIC */
	struct address local;
	struct address peer;
	__u32 endpoint;
	__u32 ifindex;
	__u32 rule;
	__u32 ruleset;
	__u32 class;
	__u32 length; /* bytes on the wire */
	__u16 local_port;
	__u16 peer_port;
	__u16 ethertype;
	__u8 type; /* enum event_type */
	__u8 direction;
	__u8 verdict; /* enum verdict */
	__u8 reason;  /* enum reason */
	__u8 protocol;
	__u8 tcp_flags;
	__u8 icmp_type;
	__u8 icmp_code;
	__u8 reserved[2];
};

/* An event of after_nat: peer is the backend, this the way to it. */
struct service_event {
	struct event event;
	struct address frontend;
	__u16 frontend_port; /* 0: not known */
	__u16 reserved[3];
};

struct endpoint_counters {
	__u64 allowed_packets[2]; /* by direction */
	__u64 allowed_bytes[2];
	__u64 dropped_packets[2];
	__u64 dropped_bytes[2];
};

struct counter {
	__u64 packets;
	__u64 bytes;
};

/* One record of what belongs to the instance as a whole. */
struct state {
	__u32 epoch; /* bumped when verdicts of open flows may have changed */
	__u32 next_endpoint;
	__u32 generation; /* bumped by each ADD, DEL and GC */
	__u32 services;   /* enum services_mode */
	__u64 nodes_ns; /* CLOCK_REALTIME when all PEER_NODEs were last known */
	__u64 netns;    /* inode of the network namespace of the last ADD */
	__u64 reserved[2];
};

/* When packets to a Service are judged. */
enum services_mode {
	SERVICES_NONE = 0,   /* there never were any */
	SERVICES_BEFORE = 1, /* before translation, on all backends */
	SERVICES_AFTER = 2,  /* after it, on the backend, by after_nat */
};

/*
 * What from_pod leaves in skb->tc_index, for after_nat and for to_pod: the slot
 * of the pod's gate, plus one, and whether the packet was judged. It stays with
 * the packet on its way through the node. The slot is 0 where it has no room.
 */
#define TAG_JUDGED 0x8000U
#define TAG_SLOT 0x7fffU

/*
 * What from_pod tells after_nat about the packet that it has just deferred:
 * both run on one CPU, one after the other.
 */
struct handover {
	struct flow_key key; /* before translation */
	__u64 translated;    /* what is allowed as of now, or 0 */
	__u64 tick;          /* jiffies */
	__u32 slot;
	__u32 rule;
};

/*
 * A probe is a packet that user space runs through these programs with
 * BPF_PROG_TEST_RUN on the loopback device, which has no gate: it is judged
 * under the gate named in cb[1] as a first packet, and nothing is recorded.
 */
#define PROBE_MAGIC 0x70676174U
#define PROBE_LOCAL_ORIGIN 1U
#define PROBE_LOOPBACK 1
