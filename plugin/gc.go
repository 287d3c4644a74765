// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"

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
	keep, err := keys(state, n.Valid.List)
	if err != nil {
		return err
	}
	removed, err := state.GC(ctx, n.Name, keep)
	for _, key := range removed {
		logger.Info("collected", "container", key.ContainerID, "interface", key.IfName)
	}
	return err
}

// keys of the endpoints to keep: those of the valid attachments, and all others
// of their containers. An attachment may have gates at further interfaces, which
// no list names; to keep one too many is better than to open one.
func keys(state *pinning.State, valid []types.GCAttachment) (map[pinning.AttachmentKey]struct{}, error) {
	containers := map[string]struct{}{}
	for _, a := range valid {
		containers[a.ContainerID] = struct{}{}
	}
	keep := map[pinning.AttachmentKey]struct{}{}
	for e, err := range state.Endpoints() {
		if err != nil && e.Key == (pinning.AttachmentKey{}) {
			return nil, err
		}
		if _, ok := containers[e.Key.ContainerID]; ok {
			keep[e.Key] = struct{}{}
		}
	}
	return keep, nil
}
