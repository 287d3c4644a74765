// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package policy

import "net/netip"

// Direction of traffic, always seen from the pod.
type Direction uint8

// The two directions, in the order the kernel stores them.
const (
	Ingress Direction = iota
	Egress
)

// Tier orders policies. Admin is judged before Namespace, Namespace before
// Baseline.
type Tier uint8

// The tiers of the Kubernetes network policy APIs. networking.k8s.io/v1
// NetworkPolicy lives in TierNamespace.
const (
	TierAdmin Tier = iota
	TierNamespace
	TierBaseline
)

// Action is what a matching rule does. The zero value denies.
type Action uint8

// Pass ends the rule's own tier and goes on with the next one. It never
// reaches a compiled [Interval].
const (
	Deny Action = iota
	Allow
	Pass
)

// Protocol is an IANA protocol number (RFC 5237).
type Protocol uint8

// The protocols that have ports. AnyProtocol stands for all protocols,
// with or without ports.
const (
	AnyProtocol Protocol = 0
	ICMP        Protocol = 1
	TCP         Protocol = 6
	UDP         Protocol = 17
	ICMPv6      Protocol = 58
	SCTP        Protocol = 132
)

// Policy is one policy object of any kind, translated. A NetworkPolicy
// isolates the directions of its policyTypes and has only Allow rules.
type Policy struct {
	// UID is the object's identity. Sources without UIDs use kind/namespace/name.
	UID             string
	Kind            string
	Namespace, Name string

	Tier Tier
	// Priority orders policies within a tier, lowest first. Policies of
	// TierNamespace are unordered: their rules are ORed.
	Priority int32

	Subject PodSelector
	// Isolates names the directions in which a subject is denied what no rule
	// of TierNamespace allows, indexed by [Direction]. Only policies of that
	// tier isolate, and they have no say in a direction they do not isolate.
	Isolates [2]bool
	// Rules are indexed by [Direction]; their order counts outside
	// TierNamespace, where they all allow.
	Rules [2][]Rule
}

// Rule matches a packet when one of its peers and one of its ports match.
type Rule struct {
	Action Action
	// AnyPeer matches every address, in or out of the cluster; Peers is then
	// ignored. A rule without AnyPeer and without Peers matches nothing.
	AnyPeer bool
	Peers   []Peer
	// AnyPort matches every protocol and port; Ports is then ignored. A rule
	// without AnyPort and without Ports matches nothing.
	AnyPort bool
	Ports   []Port
	// Text is the rule as a person would say it, for status and flow output.
	Text string
}

// Peer is one of Pods, Block; exactly one is set.
type Peer struct {
	Pods  *PodSelector
	Block *Block
}

// PodSelector selects pods by the labels of their namespace and their own.
// Both must match. Pods on the host network are never selected.
type PodSelector struct {
	// Namespace selects one namespace by name when it is not empty;
	// Namespaces is then ignored.
	Namespace  string
	Namespaces Selector
	Pods       Selector
}

// Selector is a conjunction of requirements; an empty one selects everything.
type Selector []Requirement

// Requirement on one label, after metav1.LabelSelectorRequirement.
type Requirement struct {
	Key      string
	Operator Operator
	Values   []string
}

// Operator of a [Requirement].
type Operator uint8

// In and Exists need the key to be present; NotIn and DoesNotExist match when
// it is absent. An empty value is a value.
const (
	In Operator = iota
	NotIn
	Exists
	DoesNotExist
)

// Block is a range of addresses of one family less some parts of it. It
// matches pod addresses too.
type Block struct {
	CIDR   netip.Prefix
	Except []netip.Prefix
}

// Port is a range of ports of one protocol, both ends included, or a named
// port of the destination pod.
type Port struct {
	Protocol    Protocol
	First, Last uint16
	// Name is resolved on the destination pod, with the protocol. A pod that
	// does not have it is not matched; addresses that are no pods never are.
	Name string
}

// Namespace is a namespace's name and labels.
type Namespace struct {
	Name   string
	Labels map[string]string
}

// PodKey identifies a pod: its UID, or namespace/name where the source has no
// UIDs.
type PodKey string

// Pod is what policy needs to know of a pod.
type Pod struct {
	Key             PodKey
	UID             string
	Namespace, Name string
	Labels          map[string]string
	// Addresses of the pod, of both families; empty before it has any.
	Addresses []netip.Addr
	Ports     []NamedPort
	// HostNetwork pods share their node's address: they are neither subject
	// nor pod peer.
	HostNetwork bool
	// Terminating pods give way to others that have the same address: it is
	// free for reuse before the object of its former pod is gone.
	Terminating bool
	// Local pods run on this node: they get rulesets. Others are peers only.
	Local bool
	// Audit lets through what policy would deny, and says so.
	Audit bool
}

// NamedPort is a container port with a name.
type NamedPort struct {
	Name     string
	Protocol Protocol
	Port     uint16
}
