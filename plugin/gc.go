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

// gc forgets the attachments to this network that the runtime does not know.
func (c *call) gc(ctx context.Context, args *skel.CmdArgs) error {
	n, err := conf.Parse(args.StdinData)
	if err != nil {
		return err
	}
	logger, done := c.logger(n.Log)
	defer done()
	if !n.Valid.Given {
		// A runtime that gives no list has not said that its pods are gone.
		logger.Info("GC without a list of valid attachments", "network", n.Name)
		return nil
	}
	state, err := pinning.Open(ctx, options(n.Instance, logger))
	if errors.Is(err, pinning.ErrNotInstalled) {
		return nil
	}
	if err != nil {
		return err
	}
	defer state.Close()
	keep := make(map[pinning.AttachmentKey]struct{}, len(n.Valid.List))
	for _, a := range n.Valid.List {
		keep[pinning.AttachmentKey{ContainerID: a.ContainerID, IfName: a.IfName}] = struct{}{}
	}
	removed, err := state.GC(ctx, n.Name, keep)
	for _, key := range removed {
		logger.Info("collected", "container", key.ContainerID, "interface", key.IfName)
	}
	return err
}
