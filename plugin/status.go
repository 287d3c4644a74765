// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/containernetworking/cni/pkg/skel"

	"github.com/podgate/podgate/conf"
	"github.com/podgate/podgate/pinning"
)

// status says whether ADD would work, and does nothing.
func (c *call) status(ctx context.Context, args *skel.CmdArgs) error {
	n, err := conf.Parse(args.StdinData)
	if err != nil {
		return err
	}
	logger, done := c.logger(n.Log)
	defer done()
	return c.ready(ctx, options(n.Instance, logger))
}

// ready fails with [errNotReady]. State that is not there is no fault, for the
// first ADD makes it, as long as there is a directory to make it in.
func (c *call) ready(ctx context.Context, o pinning.Options) error {
	state, err := pinning.Open(ctx, o)
	if errors.Is(err, pinning.ErrNotInstalled) {
		if _, err := os.Stat(o.Layout.BPFFS); err != nil {
			return fmt.Errorf("%w: no BPF file system: %w", errNotReady, err)
		}
		return nil
	}
	if err != nil {
		return fmt.Errorf("%w: %w", errNotReady, err)
	}
	defer state.Close()
	if err := state.Ready(ctx); err != nil {
		return fmt.Errorf("%w: %w", errNotReady, err)
	}
	return nil
}
