// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"

	"github.com/containernetworking/cni/pkg/skel"

	"github.com/podgate/podgate/conf"
	"github.com/podgate/podgate/pinning"
)

// del forgets the attachment with all interfaces that came with it. It needs neither the pod's network namespace nor
// its interface nor a prevResult, and what was never added is deleted.
func (c *call) del(ctx context.Context, args *skel.CmdArgs) error {
	n, err := conf.Parse(args.StdinData)
	if err != nil {
		return err
	}
	logger, done := c.logger(n.Log)
	defer done()
	state, err := pinning.Open(ctx, options(n.Instance, logger))
	if errors.Is(err, pinning.ErrNotInstalled) {
		return nil
	}
	if err != nil {
		return err
	}
	defer state.Close()
	return state.Delete(ctx, pinning.AttachmentKey{ContainerID: args.ContainerID, IfName: args.IfName})
}
