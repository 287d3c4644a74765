// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package reach

import (
	"context"
	"net/netip"

	"github.com/podgate/podgate/bpf/flow"
	"github.com/podgate/podgate/bpf/policy"
	"github.com/podgate/podgate/pinning"
	"github.com/podgate/podgate/syncd/service"
	"github.com/podgate/podgate/syncd/source"
)

// frontend is where a port of a Service is reached.
type frontend struct {
	address  netip.AddrPort
	protocol policy.Protocol
}

// takeServices notes the frontends that have backends: those without are judged
// as the addresses they are.
func (e *Evaluator) takeServices(batch source.Batch, node []netip.Addr) {
	table := service.NewTable()
	table.Apply(batch)
	for _, s := range table.Ports(node) {
		if len(s.Backends) == 0 {
			continue
		}
		for _, f := range s.Frontends {
			e.services[frontend{f, s.Protocol}] = s
		}
	}
}

// throughService answers with a path over each backend, if a pod asks for the
// frontend of a Service: policy is about what kube-proxy makes of the packet.
func (e *Evaluator) throughService(ctx context.Context, from Party, source, destination netip.Addr, port Port) ([]Path, error) {
	s, ok := e.services[frontend{netip.AddrPortFrom(destination, port.Port), port.Protocol}]
	if !ok || from.Pod == nil || from.Pod.HostNetwork {
		return nil, nil
	}
	var paths []Path
	for _, b := range s.Backends {
		p, err := e.path(ctx, from, e.partyAt(b.Addr()), source, b.Addr(), Port{Protocol: port.Protocol, Port: b.Port()})
		if err != nil {
			return nil, err
		}
		p.To, p.Service, p.Backend = destination, s.String(), b
		paths = append(paths, p)
	}
	return paths, e.judgeBefore(ctx, from, paths, port)
}

// judgeBefore gives the egress of all paths the verdict of a kernel that has to
// judge before a backend is chosen: on all of them or none.
func (e *Evaluator) judgeBefore(ctx context.Context, from Party, paths []Path, port Port) error {
	number, has := e.gate(from.Pod.Key, paths[0].From)
	if e.state == nil || !has {
		return nil
	}
	mode, err := e.state.ServicesMode()
	if err != nil || mode != pinning.ServicesBefore {
		return err
	}
	kernel, err := e.askKernel(ctx, policy.Egress, number, paths[0].From, paths[0].To, port)
	if err != nil {
		return err
	}
	for i := range paths {
		s := &paths[i].Sides[0]
		s.Kernel, s.Verdict = kernel, kernel.Verdict
		s.Disagree = s.Compiler != nil && s.Compiler.Verdict != kernel.Verdict && kernel.Reason != flow.ServiceMixed.Explain()
		paths[i].conclude()
	}
	return nil
}
