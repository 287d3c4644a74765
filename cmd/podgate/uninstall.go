// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/podgate/podgate/install"
	"github.com/podgate/podgate/syncd/metrics"
)

func (a *app) uninstallCommand() *cobra.Command {
	var f installFlags
	var root, stay string
	cmd := &cobra.Command{
		Use:   "uninstall",
		Short: "Take podgate off this node",
		Long: `Undoes what "podgate install" has recorded: the network configuration first, so
that nobody calls podgate any more, then the gates and the pinned state, at last
the binaries. Containers keep running and keep their connections; they are no
longer gated.

What somebody else has changed since, or still needs, stays and is named, and the
exit code is 2. Call it again when that is settled.

With --stay it tries until nothing is left, and then waits to be told to end.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if root != "" {
				if err := enter(root); err != nil {
					return fmt.Errorf("--root %s: %w", root, err)
				}
			}
			if stay != "" && !cmd.Flags().Changed("log-level") {
				a.logLevel = slog.LevelInfo
			}
			o, err := a.installOptions(f)
			if err != nil {
				return err
			}
			if stay != "" {
				return a.uninstallAndStay(cmd.Context(), o, f.wait, stay)
			}
			var done changes
			o.Step = done.step
			ctx, cancel := context.WithTimeout(cmd.Context(), f.wait)
			defer cancel()
			done.Left, err = install.Uninstall(ctx, o)
			if err == nil && len(done.Left) > 0 {
				err = errProblem
			}
			return errors.Join(err, a.print(done, done.text))
		},
	}
	flags := cmd.Flags()
	f.shared(flags)
	f.settle(flags)
	flags.StringVar(&root, "root", "", "the node's file system, seen from a container: all paths are below it")
	flags.StringVar(&stay, "stay", "", "try until nothing is left, then stay; address to serve /healthz and /readyz on, such as 127.0.0.1:9967")
	complete(cmd, "systemd", systemdAuto, systemdOn, systemdOff)
	cmd.MarkFlagsMutuallyExclusive("stay", "dry-run")
	return cmd
}

// enter makes a directory the root of this process.
func enter(root string) error {
	if err := unix.Chroot(root); err != nil {
		return err
	}
	return unix.Chdir("/")
}

// uninstallRetry is how long after a failure it is tried again.
const uninstallRetry = 2 * time.Second

// uninstallAndStay is for a DaemonSet, whose pods are ready when podgate is off
// their nodes, and would be started again if they ended.
func (a *app) uninstallAndStay(ctx context.Context, o install.Options, timeout time.Duration, probes string) error {
	logger := a.logger()
	o.Logger, o.Step = logger, func(what string) { logger.Info(what) }
	health := &installed{err: errors.New("not uninstalled yet")}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return metrics.Server{Health: health}.Serve(ctx, probes) })
	g.Go(func() error {
		for {
			err := uninstallAll(ctx, o, timeout)
			health.report(err)
			if err == nil {
				logger.Info("podgate is off this node")
				return nil
			}
			logger.Warn("podgate is not off this node yet", "error", err)
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(uninstallRetry):
			}
		}
	})
	return g.Wait()
}

// uninstallAll fails if something is left.
func uninstallAll(ctx context.Context, o install.Options, timeout time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	left, err := install.Uninstall(ctx, o)
	for _, l := range left {
		err = errors.Join(err, errors.New(l))
	}
	return err
}
