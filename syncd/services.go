// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package syncd

import (
	"context"
	"errors"
	"net/netip"
	"slices"

	"github.com/podgate/podgate/pinning"
	"github.com/podgate/podgate/syncd/manifest"
	"github.com/podgate/podgate/syncd/service"
	"github.com/podgate/podgate/syncd/source"
)

// services are those of the source, and how far the state knows them.
type services struct {
	table *service.Table
	// node has the node's addresses, and located says that they are known; ports
	// those at which the state was told node ports.
	node, ports []netip.Addr
	located     bool
	// known says that the source has told all there are, due that the state
	// has to be told, and all of them if backends are not all that changed.
	known, due, all bool
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
		s.known, s.due, s.all = true, true, true
	}
}

// locate notes the node's addresses.
func (s *services) locate(addrs []netip.Addr) { s.node, s.located = addrs, true }

// portAddresses are where node ports have to be told: at all of the node's
// addresses if a packet is judged before translation. Where it is judged after
// it, so is all that is sent to the node, and what is told serves for names. The
// link-local addresses are left out then: the veth of each pod has one, so that
// they are many, and change whenever a pod comes or goes.
func (d *Daemon) portAddresses() ([]netip.Addr, error) {
	mode, err := d.opts.State.ServicesMode()
	if err != nil || mode == pinning.ServicesBefore {
		return d.services.node, err
	}
	return slices.DeleteFunc(slices.Clone(d.services.node), netip.Addr.IsLinkLocalUnicast), nil
}

// setServices tells the state the Services once all are known: those it has
// not been told yet would look like gone.
func (d *Daemon) setServices(ctx context.Context) {
	s := &d.services
	if !s.known || !s.located {
		return
	}
	addrs, err := d.portAddresses()
	if d.problems.set("services mode", "services", err); err != nil {
		return
	}
	located := slices.Equal(addrs, s.ports)
	if !s.due && located {
		return
	}
	moved, only := s.table.Moved()
	if only = only && located && !s.all; only {
		err = d.opts.State.MoveBackends(ctx, moved)
		d.log.Debug("backends of services", "ports", len(moved), "error", err)
	}
	if !only || err != nil {
		ports := s.table.Ports(addrs)
		err = d.opts.State.SetServices(ctx, ports)
		d.log.Debug("services", "ports", len(ports), "error", err)
	}
	if ctx.Err() != nil {
		return
	}
	// What has failed is tried again as a whole.
	s.failed = err != nil
	s.due, s.all, s.ports = false, s.failed, addrs
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
