// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package hubble

import (
	"encoding/binary"
	"fmt"
	"strings"

	flowpb "github.com/cilium/cilium/api/v1/flow"
	"github.com/google/uuid"
	"google.golang.org/protobuf/types/known/timestamppb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/podgate/podgate/bpf"
	"github.com/podgate/podgate/bpf/flow"
	"github.com/podgate/podgate/bpf/policy"
	"github.com/podgate/podgate/observe/history"
	"github.com/podgate/podgate/observe/naming"
)

// Event types, which are not in the API: Cilium's pkg/monitor/api.
const (
	eventDrop          = 1
	eventTrace         = 4
	eventPolicyVerdict = 5
)

// Flags of a TCP header (RFC 9293 3.1, RFC 3168).
const (
	tcpFIN = 1 << iota
	tcpSYN
	tcpRST
	tcpPSH
	tcpACK
	tcpURG
	tcpECE
	tcpCWR
)

// flow is a record as Hubble writes it. number makes it another one than all
// others of this server.
func (s *Server) flow(r *history.Record, number uint64) *flowpb.Flow {
	f := &flowpb.Flow{
		Time:             timestamppb.New(r.Event.Time),
		Uuid:             s.uuid(number),
		Emitter:          &flowpb.Emitter{Name: "podgate", Version: strings.TrimPrefix(s.opts.Version, "v")},
		Type:             flowpb.FlowType_L3_L4,
		NodeName:         s.nodeName(),
		TrafficDirection: flowpb.TrafficDirection_INGRESS,
		IsReply:          isReply(&r.Event),
		Interface:        &flowpb.NetworkInterface{Index: r.Event.Ifindex},
	}
	local, peer := s.endpoint(r.Local), s.endpoint(r.Peer)
	source, destination := r.Event.Peer, r.Event.Local
	f.Source, f.Destination = peer, local
	if r.Event.Direction == policy.Egress {
		f.TrafficDirection = flowpb.TrafficDirection_EGRESS
		f.Source, f.Destination = local, peer
		source, destination = destination, source
		if v := r.Service; v != nil {
			f.DestinationService = &flowpb.Service{Namespace: v.Namespace, Name: v.Name}
		}
	}
	if isIP(r.Event.EtherType) {
		f.IP = &flowpb.IP{Source: source.Addr().String(), Destination: destination.Addr().String(), IpVersion: flowpb.IPVersion_IPv4}
		if source.Addr().Is6() {
			f.IP.IpVersion = flowpb.IPVersion_IPv6
		}
		f.L4 = layer4(&r.Event, uint32(source.Port()), uint32(destination.Port()))
	}
	judged(f, r)
	f.Extensions = detailsOf(r).encode()
	//nolint:staticcheck // clients print it still
	f.Summary = summary(f)
	return f
}

// EtherTypes (IEEE 802 numbers).
const (
	etherIPv4 = 0x0800
	etherIPv6 = 0x86dd
)

func isIP(etherType uint16) bool { return etherType == etherIPv4 || etherType == etherIPv6 }

// judged fills in the verdict and what it rests on.
func judged(f *flowpb.Flow, r *history.Record) {
	switch r.Event.Verdict {
	case flow.Denied:
		f.Verdict = flowpb.Verdict_DROPPED
		f.DropReasonDesc = dropReason(r.Event.Reason)
		//nolint:staticcheck // clients read it still
		f.DropReason = uint32(f.DropReasonDesc)
		f.EventType = &flowpb.CiliumEventType{Type: eventDrop, SubType: int32(f.DropReasonDesc)}
	case flow.Audited:
		f.Verdict = flowpb.Verdict_AUDIT
		f.EventType = &flowpb.CiliumEventType{Type: eventPolicyVerdict}
	default:
		f.Verdict = flowpb.Verdict_FORWARDED
		f.TraceObservationPoint = flowpb.TraceObservationPoint_TO_ENDPOINT
		if r.Event.Direction == policy.Egress {
			f.TraceObservationPoint = flowpb.TraceObservationPoint_FROM_ENDPOINT
		}
		f.TraceReason = flowpb.TraceReason_NEW
		f.EventType = &flowpb.CiliumEventType{Type: eventTrace, SubType: int32(f.TraceObservationPoint)}
		if r.Rule != nil {
			f.EventType = &flowpb.CiliumEventType{Type: eventPolicyVerdict}
		}
	}
	if r.Rule == nil {
		return
	}
	f.PolicyLog = []string{r.Rule.Text}
	by := []*flowpb.Policy{policyOf(&r.Rule.Policy)}
	if len(r.Isolating) > 0 {
		by = by[:0]
		for i := range r.Isolating {
			by = append(by, policyOf(&r.Isolating[i]))
		}
	}
	switch allowed := r.Event.Verdict == flow.Allowed; {
	case allowed && r.Event.Direction == policy.Egress:
		f.EgressAllowedBy = by
	case allowed:
		f.IngressAllowedBy = by
	case r.Event.Direction == policy.Egress:
		f.EgressDeniedBy = by
	default:
		f.IngressDeniedBy = by
	}
}

func policyOf(p *policy.PolicyInfo) *flowpb.Policy {
	return &flowpb.Policy{Kind: p.Kind, Namespace: p.Namespace, Name: p.Name}
}

// dropReason is Cilium's reason that is nearest to a reason of podgate's.
func dropReason(r flow.Reason) flowpb.DropReason {
	switch bpf.DatapathReason(r) {
	case bpf.DatapathReasonREASON_POLICY:
		return flowpb.DropReason_POLICY_DENY // by a rule
	case bpf.DatapathReasonREASON_DEFAULT, bpf.DatapathReasonREASON_SERVICE_MIXED:
		return flowpb.DropReason_POLICY_DENIED // by lack of one
	case bpf.DatapathReasonREASON_CLOSED:
		return flowpb.DropReason_DROP_EP_NOT_READY
	case bpf.DatapathReasonREASON_SPOOFED_MAC, bpf.DatapathReasonREASON_SPOOFED_ADDRESS, bpf.DatapathReasonREASON_SPOOFED_NEIGHBOUR:
		return flowpb.DropReason_INVALID_SOURCE_IP
	case bpf.DatapathReasonREASON_MALFORMED:
		return flowpb.DropReason_CT_TRUNCATED_OR_INVALID_HEADER
	case bpf.DatapathReasonREASON_EXTENSIONS:
		return flowpb.DropReason_INVALID_IPV6_EXTENSION_HEADER
	case bpf.DatapathReasonREASON_FRAGMENT:
		return flowpb.DropReason_FIRST_LOGICAL_DATAGRAM_FRAGMENT_NOT_FOUND
	case bpf.DatapathReasonREASON_ETHERTYPE:
		return flowpb.DropReason_UNSUPPORTED_L2_PROTOCOL
	case bpf.DatapathReasonREASON_TABLE:
		return flowpb.DropReason_CT_MAP_INSERTION_FAILED
	case bpf.DatapathReasonREASON_SOURCE_ROUTE, bpf.DatapathReasonREASON_MARTIAN:
		return flowpb.DropReason_INVALID_PACKET_DROPPED
	default:
		return flowpb.DropReason_DROP_REASON_UNKNOWN
	}
}

// isReply is nil where nobody knows. The datapath tells of the first packet of a
// flow, and of packets that have none, which only TCP says more of.
func isReply(f *flow.Flow) *wrapperspb.BoolValue {
	switch {
	case f.Verdict == flow.Allowed:
		return wrapperspb.Bool(false)
	case f.Protocol == policy.TCP && f.TCPFlags&tcpSYN != 0:
		return wrapperspb.Bool(f.TCPFlags&tcpACK != 0)
	}
	return nil
}

func (s *Server) endpoint(p *naming.Party) *flowpb.Endpoint {
	e := &flowpb.Endpoint{
		ID: p.Endpoint, Identity: p.Identity, Namespace: p.Namespace, PodName: p.Pod, Labels: p.Labels,
	}
	if p.Pod != "" {
		e.ClusterName = s.opts.Cluster
	}
	if p.Workload.Name != "" {
		e.Workloads = []*flowpb.Workload{{Kind: p.Workload.Kind, Name: p.Workload.Name}}
	}
	return e
}

func layer4(f *flow.Flow, source, destination uint32) *flowpb.Layer4 {
	switch f.Protocol {
	case policy.TCP:
		return &flowpb.Layer4{Protocol: &flowpb.Layer4_TCP{TCP: &flowpb.TCP{
			SourcePort: source, DestinationPort: destination, Flags: tcpFlags(f.TCPFlags),
		}}}
	case policy.UDP:
		return &flowpb.Layer4{Protocol: &flowpb.Layer4_UDP{UDP: &flowpb.UDP{SourcePort: source, DestinationPort: destination}}}
	case policy.SCTP:
		return &flowpb.Layer4{Protocol: &flowpb.Layer4_SCTP{SCTP: &flowpb.SCTP{SourcePort: source, DestinationPort: destination}}}
	case policy.ICMP:
		return &flowpb.Layer4{Protocol: &flowpb.Layer4_ICMPv4{ICMPv4: &flowpb.ICMPv4{Type: uint32(f.ICMPType), Code: uint32(f.ICMPCode)}}}
	case policy.ICMPv6:
		return &flowpb.Layer4{Protocol: &flowpb.Layer4_ICMPv6{ICMPv6: &flowpb.ICMPv6{Type: uint32(f.ICMPType), Code: uint32(f.ICMPCode)}}}
	}
	return nil
}

func tcpFlags(b uint8) *flowpb.TCPFlags {
	return &flowpb.TCPFlags{
		FIN: b&tcpFIN != 0, SYN: b&tcpSYN != 0, RST: b&tcpRST != 0, PSH: b&tcpPSH != 0,
		ACK: b&tcpACK != 0, URG: b&tcpURG != 0, ECE: b&tcpECE != 0, CWR: b&tcpCWR != 0,
	}
}

// summary is what Hubble's command line prints last.
func summary(f *flowpb.Flow) string {
	switch l4 := f.GetL4().GetProtocol().(type) {
	case *flowpb.Layer4_TCP:
		var names []string
		flags := l4.TCP.GetFlags()
		for _, b := range []struct {
			set  bool
			name string
		}{
			{flags.GetSYN(), "SYN"}, {flags.GetACK(), "ACK"}, {flags.GetRST(), "RST"}, {flags.GetFIN(), "FIN"},
			{flags.GetPSH(), "PSH"}, {flags.GetURG(), "URG"}, {flags.GetECE(), "ECE"}, {flags.GetCWR(), "CWR"},
		} {
			if b.set {
				names = append(names, b.name)
			}
		}
		return "TCP Flags: " + strings.Join(names, ", ")
	case *flowpb.Layer4_UDP:
		return "UDP"
	case *flowpb.Layer4_SCTP:
		return "SCTP"
	case *flowpb.Layer4_ICMPv4:
		return fmt.Sprintf("ICMPv4 type %d code %d", l4.ICMPv4.GetType(), l4.ICMPv4.GetCode())
	case *flowpb.Layer4_ICMPv6:
		return fmt.Sprintf("ICMPv6 type %d code %d", l4.ICMPv6.GetType(), l4.ICMPv6.GetCode())
	}
	return ""
}

// uuid is that of a record: one of version 8 (RFC 9562 5.8) whose first half is
// the server's.
func (s *Server) uuid(number uint64) string {
	id := uuid.UUID{}
	copy(id[:8], s.instance[:])
	binary.BigEndian.PutUint64(id[8:], number)
	id[6] = id[6]&0x0f | 0x80
	id[8] = id[8]&0x3f | 0x80
	return id.String()
}
