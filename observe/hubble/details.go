// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package hubble

import (
	"net/netip"

	flowpb "github.com/cilium/cilium/api/v1/flow"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/podgate/podgate/bpf/policy"
	"github.com/podgate/podgate/observe/history"
)

// Details are what podgate knows of a flow and Hubble has no field for. They are
// in the flow's extensions, as a google.protobuf.Struct.
type Details struct {
	// Reason in podgate's words.
	Reason string
	// Isolated says that no rule matched, and isolation decided.
	Isolated bool
	// Length of the packet in bytes.
	Length uint32
	// Frontend of the Service over which the peer was reached.
	Frontend netip.AddrPort
	// EtherType of the frame, and its Protocol if Hubble cannot say that.
	EtherType uint16
	Protocol  policy.Protocol
}

const (
	detailReason    = "reason"
	detailIsolated  = "isolated"
	detailLength    = "length"
	detailFrontend  = "frontend"
	detailEtherType = "ethertype"
	detailProtocol  = "protocol"
)

func detailsOf(r *history.Record) Details {
	return Details{
		Reason: r.Event.Reason.String(), Isolated: r.Rule != nil && r.Rule.Index < 0, Length: r.Event.Length,
		Frontend: r.Event.Frontend, EtherType: r.Event.EtherType, Protocol: r.Event.Protocol,
	}
}

func (d Details) encode() *anypb.Any {
	fields := map[string]*structpb.Value{
		detailReason:    structpb.NewStringValue(d.Reason),
		detailLength:    structpb.NewNumberValue(float64(d.Length)),
		detailEtherType: structpb.NewNumberValue(float64(d.EtherType)),
		detailProtocol:  structpb.NewNumberValue(float64(d.Protocol)),
	}
	if d.Isolated {
		fields[detailIsolated] = structpb.NewBoolValue(true)
	}
	if d.Frontend.IsValid() {
		fields[detailFrontend] = structpb.NewStringValue(d.Frontend.String())
	}
	out, err := anypb.New(&structpb.Struct{Fields: fields})
	if err != nil {
		return nil // there is no text in it that is no UTF-8
	}
	return out
}

// DetailsOf reads the details of a flow; of one without any they are zero.
func DetailsOf(f *flowpb.Flow) Details {
	var d Details
	var s structpb.Struct
	if f.GetExtensions() == nil || f.GetExtensions().UnmarshalTo(&s) != nil {
		return d
	}
	d.Reason = s.GetFields()[detailReason].GetStringValue()
	d.Isolated = s.GetFields()[detailIsolated].GetBoolValue()
	d.Length = uint32(s.GetFields()[detailLength].GetNumberValue())
	d.Frontend, _ = netip.ParseAddrPort(s.GetFields()[detailFrontend].GetStringValue()) // none: zero
	d.EtherType = uint16(s.GetFields()[detailEtherType].GetNumberValue())
	d.Protocol = policy.Protocol(s.GetFields()[detailProtocol].GetNumberValue())
	return d
}
