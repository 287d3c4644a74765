// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"net/netip"

	"github.com/containernetworking/cni/pkg/skel"

	"github.com/podgate/podgate/conf"
	ipamhooks "github.com/podgate/podgate/ipam-hooks"
	"github.com/podgate/podgate/pinning"
)

// ipamCall is a call of podgate-ipam: the IPAM plugin behind it and the register
// of claims.
type ipamCall struct {
	*call
	delegate *ipamhooks.Delegate
	options  pinning.Options
	key      pinning.AttachmentKey
}

// withIPAM reads the parameters and calls fn.
func (c *call) withIPAM(ctx context.Context, args *skel.CmdArgs, fn func(*ipamCall, context.Context) error) error {
	n, err := conf.ParseIPAM(args.StdinData)
	if err != nil {
		return err
	}
	delegate, err := ipamhooks.NewDelegate(n.DelegateType, c.cniVersion, args.StdinData, n.Delegate, ipamhooks.Process(args.Path, c.stderr))
	if err != nil {
		return err
	}
	logger, done := c.logger(n.Log)
	defer done()
	return fn(&ipamCall{
		call:     c,
		delegate: delegate,
		options:  options(n.Instance, logger),
		key:      pinning.AttachmentKey{ContainerID: args.ContainerID, IfName: args.IfName},
	}, ctx)
}

func (i *ipamCall) add(ctx context.Context) error {
	result, err := i.delegate.Add(ctx, i)
	if err != nil {
		return err
	}
	return i.print(result)
}

func (i *ipamCall) del(ctx context.Context) error { return i.delegate.Del(ctx, i) }

func (i *ipamCall) check(ctx context.Context) error { return i.delegate.Check(ctx) }

// gc leaves claims alone: the next owner of an address takes over its claim.
func (i *ipamCall) gc(ctx context.Context) error { return i.delegate.GC(ctx) }

func (i *ipamCall) status(ctx context.Context) error {
	if err := i.ready(ctx, i.options); err != nil {
		return err
	}
	return i.delegate.Status(ctx)
}

// Claim implements [ipamhooks.Claims].
func (i *ipamCall) Claim(ctx context.Context, addresses []netip.Addr) error {
	state, err := i.ensure(ctx, i.options)
	if err != nil {
		return err
	}
	defer state.Close()
	return state.Claim(ctx, i.key, addresses)
}

// Release implements [ipamhooks.Claims].
func (i *ipamCall) Release(ctx context.Context) error {
	state, err := pinning.Open(ctx, i.options)
	if errors.Is(err, pinning.ErrNotInstalled) {
		return nil
	}
	if err != nil {
		return err
	}
	defer state.Close()
	return state.Release(ctx, i.key, nil)
}
