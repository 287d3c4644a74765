// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package flow

import (
	"fmt"

	"github.com/podgate/podgate/bpf"
)

// Verdict on a packet, enum verdict of bpf/include/types.h.
type Verdict uint8

// The verdicts. An audited packet passed, but would be denied if its endpoint
// were not audited.
const (
	Denied  = Verdict(bpf.DatapathVerdictVERDICT_DENIED)
	Allowed = Verdict(bpf.DatapathVerdictVERDICT_ALLOWED)
	Audited = Verdict(bpf.DatapathVerdictVERDICT_AUDITED)
)

func (v Verdict) String() string {
	switch v {
	case Denied:
		return "denied"
	case Allowed:
		return "allowed"
	case Audited:
		return "audited"
	}
	return fmt.Sprintf("verdict-%d", uint8(v))
}

// MarshalText gives the word.
func (v Verdict) MarshalText() ([]byte, error) { return []byte(v.String()), nil }

// Reason for a verdict, enum reason of bpf/include/types.h.
type Reason uint8

// ServiceMixed denies a Service of which policy allows some backends only, where
// it has to be judged before one is chosen.
const ServiceMixed = Reason(bpf.DatapathReasonREASON_SERVICE_MIXED)

// String is the reason in a word, as in metrics and flow output.
func (r Reason) String() string {
	if w := r.words(); w[0] != "" {
		return w[0]
	}
	return fmt.Sprintf("reason-%d", uint8(r))
}

// Explain is the reason in a sentence.
func (r Reason) Explain() string {
	if w := r.words(); w[1] != "" {
		return w[1]
	}
	return r.String()
}

// MarshalText gives the word.
func (r Reason) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

func (r Reason) words() [2]string {
	switch bpf.DatapathReason(r) {
	case bpf.DatapathReasonREASON_NONE:
		return [2]string{"none", "no reason was given"}
	case bpf.DatapathReasonREASON_POLICY:
		return [2]string{"policy", "a rule matches"}
	case bpf.DatapathReasonREASON_DEFAULT:
		return [2]string{"default", "no rule matches"}
	case bpf.DatapathReasonREASON_OPEN:
		return [2]string{"open", "no policy isolates this direction"}
	case bpf.DatapathReasonREASON_NODE:
		return [2]string{"node", "traffic with the pod's own node"}
	case bpf.DatapathReasonREASON_SELF:
		return [2]string{"self", "the pod talks to itself"}
	case bpf.DatapathReasonREASON_RELATED:
		return [2]string{"related", "an ICMP error about an allowed flow"}
	case bpf.DatapathReasonREASON_NEIGHBOUR:
		return [2]string{"neighbour", "ARP, neighbour discovery or multicast listening"}
	case bpf.DatapathReasonREASON_CLOSED:
		return [2]string{"closed", "the endpoint's policy is not known yet"}
	case bpf.DatapathReasonREASON_NO_GATE:
		return [2]string{"no-gate", "the interface belongs to no endpoint"}
	case bpf.DatapathReasonREASON_SPOOFED_MAC:
		return [2]string{"spoofed-mac", "the source MAC address is not the pod's"}
	case bpf.DatapathReasonREASON_SPOOFED_ADDRESS:
		return [2]string{"spoofed-address", "the source address is not the pod's"}
	case bpf.DatapathReasonREASON_SPOOFED_NEIGHBOUR:
		return [2]string{"spoofed-neighbour", "ARP or neighbour discovery speaks for another host"}
	case bpf.DatapathReasonREASON_OTHER_HOST:
		return [2]string{"other-host", "a flooded frame for another MAC address"}
	case bpf.DatapathReasonREASON_MALFORMED:
		return [2]string{"malformed", "the packet is truncated or its headers contradict each other"}
	case bpf.DatapathReasonREASON_EXTENSIONS:
		return [2]string{"extension-headers", "the packet has too many IPv6 extension headers"}
	case bpf.DatapathReasonREASON_SOURCE_ROUTE:
		return [2]string{"source-route", "the packet routes itself past its destination"}
	case bpf.DatapathReasonREASON_FRAGMENT:
		return [2]string{"fragment", "a fragment whose first one was not allowed, not seen or too short"}
	case bpf.DatapathReasonREASON_ETHERTYPE:
		return [2]string{"ethertype", "neither IP nor ARP, on an isolated endpoint"}
	case bpf.DatapathReasonREASON_MARTIAN:
		return [2]string{"martian", "an IPv4-mapped address on the wire"}
	case bpf.DatapathReasonREASON_TABLE:
		return [2]string{"table", "a map was full or changed while it was read"}
	case bpf.DatapathReasonREASON_SERVICE:
		return [2]string{"service", "to a Service: the backend is judged once it is chosen"}
	case bpf.DatapathReasonREASON_SERVICE_MIXED:
		return [2]string{"service-mixed", "some backends of the Service are allowed and others not, and which one is chosen is not known yet"}
	}
	return [2]string{}
}

// State of a tracked flow, enum flow_state of bpf/include/types.h.
type State uint8

func (s State) String() string {
	switch bpf.DatapathFlowState(s) {
	case bpf.DatapathFlowStateFLOW_NEW:
		return "new"
	case bpf.DatapathFlowStateFLOW_ESTABLISHED:
		return "established"
	case bpf.DatapathFlowStateFLOW_CLOSING:
		return "closing"
	case bpf.DatapathFlowStateFLOW_CLOSED:
		return "closed"
	}
	return fmt.Sprintf("state-%d", uint8(s))
}

// MarshalText gives the word.
func (s State) MarshalText() ([]byte, error) { return []byte(s.String()), nil }
