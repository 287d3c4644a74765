// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net/netip"

	flowpb "github.com/cilium/cilium/api/v1/flow"
	observerpb "github.com/cilium/cilium/api/v1/observer"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/podgate/podgate/bpf/flow"
	"github.com/podgate/podgate/bpf/policy"
	"github.com/podgate/podgate/observe/filter"
	"github.com/podgate/podgate/observe/hubble"
)

// observedFlows asks podgate observe, which holds the events. held is the error
// if it is somebody else who does.
func (a *app) observedFlows(ctx context.Context, f flowFilter, follow bool, held error) error {
	request := &observerpb.GetFlowsRequest{Follow: follow}
	if follow {
		request.Number = math.MaxUint64 // what there is, and what comes
	}
	err := a.askObserver(ctx, request, func(seen *flowpb.Flow) error {
		r := observedReport(seen)
		if !f.matches(&r) {
			return nil
		}
		return a.writeFlow(&r)
	})
	if errors.Is(err, errNoObserver) {
		return fmt.Errorf("%w; and %w", held, err)
	}
	return err
}

// errNoObserver says that podgate observe does not run here.
var errNoObserver = errors.New("podgate observe does not answer")

// askObserver asks podgate observe for flows. It fails with errNoObserver if
// there is none.
func (a *app) askObserver(ctx context.Context, request *observerpb.GetFlowsRequest, took func(*flowpb.Flow) error) (err error) {
	c, err := grpc.NewClient("unix://"+a.hubbleSocket(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	stream, err := observerpb.NewObserverClient(c).GetFlows(ctx, request)
	if err != nil {
		return fmt.Errorf("%w: %w", errNoObserver, err)
	}
	for {
		answer, err := stream.Recv()
		switch {
		case errors.Is(err, io.EOF), ctx.Err() != nil:
			return nil
		case status.Code(err) == codes.Unavailable:
			return fmt.Errorf("%w: %w", errNoObserver, err)
		case err != nil:
			return err
		}
		if lost := answer.GetLostEvents(); lost != nil {
			a.complain("podgate: %s were lost: the ring was full\n", plural(int(lost.GetNumEventsLost()), "event", "events"))
		}
		if f := answer.GetFlow(); f != nil {
			if err := took(f); err != nil {
				return err
			}
		}
	}
}

// observedReport makes a report of what podgate observe said.
func observedReport(f *flowpb.Flow) flowReport {
	d := hubble.DetailsOf(f)
	r := flowReport{
		Time: f.GetTime().AsTime(), Direction: policy.Ingress.String(), Reason: d.Reason, Length: d.Length,
		Protocol: protocolName(d.Protocol), Frontend: d.Frontend,
	}
	local, peer := f.GetDestination(), f.GetSource()
	localIP, peerIP := f.GetIP().GetDestination(), f.GetIP().GetSource()
	peerPort, localPort, _ := filter.Ports(f)
	by := append(f.GetIngressAllowedBy(), f.GetIngressDeniedBy()...)
	if f.GetTrafficDirection() == flowpb.TrafficDirection_EGRESS {
		r.Direction = policy.Egress.String()
		local, peer, localIP, peerIP, localPort, peerPort = peer, local, peerIP, localIP, peerPort, localPort
		by = append(f.GetEgressAllowedBy(), f.GetEgressDeniedBy()...)
	}
	r.Pod, r.Peer = podNameOf(local), podNameOf(peer)
	r.LocalAddress, _ = netip.ParseAddr(localIP) // none: zero
	r.PeerAddress, _ = netip.ParseAddr(peerIP)
	r.LocalPort, r.PeerPort = uint16(localPort), uint16(peerPort)
	switch f.GetVerdict() {
	case flowpb.Verdict_DROPPED:
		r.Verdict = flow.Denied.String()
	case flowpb.Verdict_AUDIT:
		r.Verdict = flow.Audited.String()
	default:
		r.Verdict = flow.Allowed.String()
	}
	if s := f.GetDestinationService(); s != nil {
		r.Service = s.GetNamespace() + "/" + s.GetName()
	}
	if d.EtherType != etherIPv4 && d.EtherType != etherIPv6 {
		r.Protocol = etherName(d.EtherType)
	}
	switch l4 := f.GetL4().GetProtocol().(type) {
	case *flowpb.Layer4_TCP:
		r.Detail = tcpFlags(flagBits(l4.TCP.GetFlags()))
	case *flowpb.Layer4_ICMPv4:
		r.Detail = icmpDetail(l4.ICMPv4.GetType(), l4.ICMPv4.GetCode())
	case *flowpb.Layer4_ICMPv6:
		r.Detail = icmpDetail(l4.ICMPv6.GetType(), l4.ICMPv6.GetCode())
	}
	if len(by) > 0 {
		info := policy.PolicyInfo{Kind: by[0].GetKind(), Namespace: by[0].GetNamespace(), Name: by[0].GetName()}
		r.Policy = info.String()
		if r.Rule = isolatedText; !d.Isolated && len(f.GetPolicyLog()) > 0 {
			r.Rule = f.GetPolicyLog()[0]
		}
	}
	return r
}

func podNameOf(e *flowpb.Endpoint) string {
	if e.GetPodName() == "" {
		return ""
	}
	return e.GetNamespace() + "/" + e.GetPodName()
}

// flagBits are flags as in the header of TCP.
func flagBits(f *flowpb.TCPFlags) (bits uint8) {
	for _, b := range []struct {
		set bool
		bit uint8
	}{{f.GetFIN(), tcpFIN}, {f.GetSYN(), tcpSYN}, {f.GetRST(), tcpRST}, {f.GetACK(), tcpACK}} {
		if b.set {
			bits |= b.bit
		}
	}
	return bits
}
