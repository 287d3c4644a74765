// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"log/slog"

	"github.com/containernetworking/cni/pkg/skel"

	"github.com/podgate/podgate/conf"
	ipamhooks "github.com/podgate/podgate/ipam-hooks"
	"github.com/podgate/podgate/pinning"
)

// del forgets the attachment. It needs neither the pod's network namespace nor
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
	var errs []error
	for _, name := range interfaceNames(n, args.IfName, logger) {
		errs = append(errs, state.Delete(ctx, pinning.AttachmentKey{ContainerID: args.ContainerID, IfName: name}))
	}
	return errors.Join(errs...)
}

// interfaceNames are those of the pod's interfaces that ADD has gated: the
// attachment's own and what else the prevResult lists, which a runtime gives
// since version 0.4.0 if it still has it. Without it the daemon sweeps the
// gates of further interfaces once these are gone.
func interfaceNames(n *conf.NetConf, ifName string, logger *slog.Logger) []string {
	names := []string{ifName}
	if n.PrevResult == nil {
		return names
	}
	result, err := ipamhooks.ParseResult(n.CNIVersion, n.PrevResult)
	if err != nil {
		logger.Warn("DEL without the interfaces of prevResult", "error", err)
		return names
	}
	interfaces, err := ipamhooks.PodInterfaces(result, ifName)
	if err != nil {
		logger.Warn("DEL without the interfaces of prevResult", "error", err)
		return names
	}
	for _, i := range interfaces[1:] {
		names = append(names, i.Name)
	}
	return names
}
