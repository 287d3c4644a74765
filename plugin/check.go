// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"

	"github.com/containernetworking/cni/pkg/skel"

	"github.com/podgate/podgate/pinning"
)

// check compares the gates of the attachment with the interfaces there are.
func (c *call) check(ctx context.Context, args *skel.CmdArgs) error {
	a, err := c.attachment(args)
	if err != nil {
		return err
	}
	logger, done := c.logger(a.conf.Log)
	defer done()
	endpoints, err := a.endpoints(logger)
	if err != nil || len(endpoints) == 0 {
		return err
	}
	state, err := pinning.Open(ctx, options(a.conf.Instance, logger))
	if err != nil {
		return fmt.Errorf("%w: %w", errCheck, err)
	}
	defer state.Close()
	for _, e := range endpoints {
		if err := state.Check(ctx, e.Key, e.Endpoint); err != nil {
			return fmt.Errorf("%w: %s: %w", errCheck, e.Key.IfName, err)
		}
	}
	return nil
}
