// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package ipamhooks

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"

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
	plugin     string
	cniVersion string
	config     []byte
	exec       Exec
}

// NewDelegate prepares calls of an IPAM plugin. It gets the main plugin's
// configuration, of the given CNI version, as it came on stdin, with ipam for
// its ipam object.
func NewDelegate(plugin, cniVersion string, stdin []byte, ipam json.RawMessage, exec Exec) (*Delegate, error) {
	config, err := setKey(stdin, "ipam", ipam)
	if err != nil {
		return nil, fmt.Errorf("configuration for %s: %w", plugin, err)
	}
	return &Delegate{plugin: plugin, cniVersion: cniVersion, config: config, exec: exec}, nil
}

// Add allocates addresses and claims them. When the claim fails the allocation
// is undone.
func (d *Delegate) Add(ctx context.Context, claims Claims) (types.Result, error) {
	stdout, err := d.run(ctx, "ADD")
	if err != nil {
		return nil, err
	}
	result, err := d.claim(ctx, claims, stdout)
	if err != nil {
		return nil, errors.Join(err, d.Del(ctx, claims))
	}
	return result, nil
}

func (d *Delegate) claim(ctx context.Context, claims Claims, stdout []byte) (types.Result, error) {
	result, err := ParseResult(d.cniVersion, stdout)
	if err != nil {
		return nil, fmt.Errorf("IPAM plugin %s: %w", d.plugin, err)
	}
	addresses, err := Addresses(result)
	if err != nil {
		return nil, fmt.Errorf("IPAM plugin %s: %w", d.plugin, err)
	}
	return result, claims.Claim(ctx, addresses)
}

// Del releases the claims and then frees the addresses: an address that still
// has a history must not be given to the next pod.
func (d *Delegate) Del(ctx context.Context, claims Claims) error {
	if err := claims.Release(ctx); err != nil {
		return err
	}
	return d.forward(ctx, "DEL")
}

// Check forwards CHECK.
func (d *Delegate) Check(ctx context.Context) error { return d.forward(ctx, "CHECK") }

// GC forwards GC.
func (d *Delegate) GC(ctx context.Context) error { return d.forward(ctx, "GC") }

// Status forwards STATUS.
func (d *Delegate) Status(ctx context.Context) error { return d.forward(ctx, "STATUS") }

func (d *Delegate) forward(ctx context.Context, verb string) error {
	_, err := d.run(ctx, verb)
	return err
}

// run names the plugin in errors, which stay the [types.Error] that it printed.
func (d *Delegate) run(ctx context.Context, verb string) ([]byte, error) {
	stdout, err := d.exec(ctx, d.plugin, verb, d.config)
	if err != nil {
		return nil, fmt.Errorf("%s of IPAM plugin %s: %w", verb, d.plugin, err)
	}
	return stdout, nil
}
