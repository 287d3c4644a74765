// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"

	"github.com/containernetworking/cni/pkg/skel"

	"github.com/podgate/podgate/conf"
	"github.com/podgate/podgate/pinning"
)

// add gates the interfaces of the pod and passes the result on. What it has
// done when it fails, DEL undoes; until then those interfaces stay gated.
func (c *call) add(ctx context.Context, args *skel.CmdArgs) error {
	a, err := c.attachment(args)
	if err != nil {
		return err
	}
	logger, done := c.logger(a.conf.Log)
	defer done()
	endpoints, err := a.endpoints(logger)
	if err != nil {
		return err
	}
	if len(endpoints) > 0 {
		state, err := c.ensure(ctx, options(a.conf.Instance, logger))
		if err != nil {
			return err
		}
		defer state.Close()
		for _, e := range endpoints {
			added, enforcement, err := state.Add(ctx, e)
			if err != nil {
				return fmt.Errorf("gate %s: %w", e.Key.IfName, err)
			}
			logger.Info("gated", "container", e.Key.ContainerID, "interface", e.Key.IfName,
				"host", added.HostIfindex, "addresses", added.Addresses, "state", enforcement.State())
		}
	}
	return c.print(a.result)
}

func (a *attachment) attach() pinning.AttachKind {
	switch {
	case a.conf.Attach == conf.AttachClsact:
		return pinning.AttachClsact
	case a.conf.Attach == conf.AttachTCX:
		return pinning.AttachTCX
	case a.conf.Runtime.Bandwidth:
		// The bandwidth plugin adds an ingress qdisc, which cannot be where a
		// clsact qdisc is, whichever of us comes first.
		return pinning.AttachTCX
	}
	return pinning.AttachAuto
}
