// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package ipamhooks

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"

	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"
)

// Claims is the register of the addresses in use on the node.
type Claims interface {
	// Claim takes addresses for the attachment.
	Claim(ctx context.Context, addresses []netip.Addr) error
	// Release gives back what the attachment has claimed, and removes what the
	// node remembers of it.
	Release(ctx context.Context) error
}

// Delegate is the IPAM plugin that podgate-ipam stands in front of.
type Delegate struct {
	plugin string
	config []byte
	exec   invoke.Exec
}

// NewDelegate prepares calls of the plugin, which is looked for in CNI_PATH.
// It gets the main plugin's configuration as it came on stdin with ipam for its
// ipam object, and the CNI_* environment of this process. exec runs it; nil
// stands for a process of its own.
func NewDelegate(plugin string, stdin []byte, ipam json.RawMessage, exec invoke.Exec) (*Delegate, error) {
	config, err := setKey(stdin, "ipam", ipam)
	if err != nil {
		return nil, fmt.Errorf("configuration for %s: %w", plugin, err)
	}
	return &Delegate{plugin: plugin, config: config, exec: exec}, nil
}

// Add allocates addresses and claims them. When the claim fails the allocation
// is undone.
func (d *Delegate) Add(ctx context.Context, claims Claims) (types.Result, error) {
	result, err := invoke.DelegateAdd(ctx, d.plugin, d.config, d.exec)
	if err != nil {
		return nil, d.wrap("ADD", err)
	}
	addresses, err := Addresses(result)
	if err == nil {
		err = claims.Claim(ctx, addresses)
	}
	if err != nil {
		return nil, errors.Join(err, d.Del(ctx, claims))
	}
	return result, nil
}

// Del releases the claims and then frees the addresses: an address that still
// has a history must not be given to the next pod.
func (d *Delegate) Del(ctx context.Context, claims Claims) error {
	if err := claims.Release(ctx); err != nil {
		return err
	}
	return d.wrap("DEL", invoke.DelegateDel(ctx, d.plugin, d.config, d.exec))
}

// Check forwards CHECK.
func (d *Delegate) Check(ctx context.Context) error {
	return d.wrap("CHECK", invoke.DelegateCheck(ctx, d.plugin, d.config, d.exec))
}

// GC forwards GC.
func (d *Delegate) GC(ctx context.Context) error {
	return d.wrap("GC", invoke.DelegateGC(ctx, d.plugin, d.config, d.exec))
}

// Status forwards STATUS.
func (d *Delegate) Status(ctx context.Context) error {
	return d.wrap("STATUS", invoke.DelegateStatus(ctx, d.plugin, d.config, d.exec))
}

// wrap names the plugin. The error stays the [types.Error] that it printed.
func (d *Delegate) wrap(verb string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s of IPAM plugin %s: %w", verb, d.plugin, err)
}
