// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package syncd

import (
	"context"
	"errors"
	"net/netip"

	"github.com/podgate/podgate/syncd/manifest"
	"github.com/podgate/podgate/syncd/service"
	"github.com/podgate/podgate/syncd/source"
)

// services are those of the source, and how far the state knows them.
type services struct {
	table *service.Table
	// node has the addresses of node ports, and located says that they are
	// known.
	node    []netip.Addr
	located bool
	// known says that the source has told all there are, due that the state
	// has to be told.
	known, due bool
	// failed says that the state could not take all of them.
	failed bool
}

func newServices() services { return services{table: service.NewTable()} }

// take notes a batch.
func (s *services) take(b source.Batch) {
	if s.table.Apply(b) {
		s.due = true
	}
	if !s.known && !b.Lacks(manifest.KindService, manifest.KindEndpointSlice) {
		s.known, s.due = true, true
	}
}

// locate notes the node's addresses.
func (s *services) locate(addrs []netip.Addr) { s.node, s.located, s.due = addrs, true, true }

// setServices tells the state the Services once all are known: those it has
// not been told yet would look like gone.
func (d *Daemon) setServices(ctx context.Context) {
	s := &d.services
	if !s.known || !s.located || !s.due {
		return
	}
	s.due = false
	ports := s.table.Ports(s.node)
	err := d.opts.State.SetServices(ctx, ports)
	if ctx.Err() != nil {
		return
	}
	s.failed = err != nil
	d.log.Debug("services", "ports", len(ports), "error", err)
	var problems []source.Problem
	for _, err := range parts(err) {
		problems = append(problems, source.Problem{Subject: "services", Reason: err.Error()})
	}
	d.problems.replace("services", problems)
}

// parts are the errors that were joined.
func parts(err error) []error {
	var joined interface{ Unwrap() []error }
	switch {
	case err == nil:
		return nil
	case errors.As(err, &joined):
		return joined.Unwrap()
	}
	return []error{err}
}
