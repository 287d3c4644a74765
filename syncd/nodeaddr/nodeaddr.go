// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

// Package nodeaddr follows the addresses of the node, which its pods may always
// talk to.
package nodeaddr

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
)

// serviceInterface is where kube-proxy in IPVS mode keeps every Service's
// address. They are addresses of the node only in form.
const serviceInterface = "kube-ipvs0"

// settle collects the messages of one change.
const settle = 50 * time.Millisecond

// List answers the addresses of the node in the current network namespace,
// sorted, less loopback's own and those of Services.
func List() ([]netip.Addr, error) {
	links, err := retry(netlink.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	addrs, err := retry(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	services := -1
	for _, l := range links {
		if l.Attrs().Name == serviceInterface {
			services = l.Attrs().Index
		}
	}
	var out []netip.Addr
	for _, a := range addrs {
		ip, ok := netip.AddrFromSlice(a.IP)
		if ip = ip.Unmap(); ok && !ip.IsLoopback() && a.LinkIndex != services {
			out = append(out, ip)
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return slices.Compact(out), nil
}

// retry repeats a dump that a change interrupted.
func retry[T any](dump func() ([]T, error)) (out []T, err error) {
	for range 5 {
		if out, err = dump(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			return out, err
		}
	}
	return out, err
}

// Watch delivers the addresses and then each change of them until ctx is done.
// It fails only if it cannot begin.
func Watch(ctx context.Context, logger *slog.Logger, deliver func([]netip.Addr)) error {
	done := make(chan struct{})
	defer close(done)
	updates := make(chan netlink.AddrUpdate, 64)
	lost := make(chan error, 1)
	err := netlink.AddrSubscribeWithOptions(updates, done, netlink.AddrSubscribeOptions{
		ErrorCallback: func(err error) {
			select {
			case lost <- err:
			default:
			}
		},
	})
	if err != nil {
		return fmt.Errorf("subscribe to address changes: %w", err)
	}
	current, err := List()
	if err != nil {
		return err
	}
	deliver(current)
	for {
		select {
		case <-ctx.Done():
			return nil
		case err := <-lost:
			return fmt.Errorf("address changes: %w", err)
		case _, ok := <-updates:
			if !ok {
				return errors.New("address changes: the kernel ended the subscription")
			}
		}
		drain(ctx, updates)
		next, err := List()
		if err != nil {
			logger.Warn("addresses of the node", "error", err)
			continue
		}
		if !slices.Equal(next, current) {
			current = next
			deliver(current)
		}
	}
}

// drain takes what comes within the settling time.
func drain(ctx context.Context, updates <-chan netlink.AddrUpdate) {
	timeout := time.After(settle)
	for {
		select {
		case <-ctx.Done():
			return
		case <-timeout:
			return
		case _, ok := <-updates:
			if !ok {
				return
			}
		}
	}
}
