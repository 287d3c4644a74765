// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/podgate/podgate/install"
	"github.com/podgate/podgate/syncd/metrics"
)

// keeper keeps podgate installed on a node.
type keeper struct {
	*app
	options install.Options
	log     *slog.Logger
	// probes is where to serve probes, and daemonSet whose end is the end of
	// the installation; both may be empty.
	probes, daemonSet, kubeconfig string
	// merged says that containers may be without a gate.
	merged chan struct{}
}

// watch keeps podgate installed until it is told to end, and takes it off then
// if it has been deleted.
func (a *app) watch(cmd *cobra.Command, f *installFlags, o install.Options) error {
	if !cmd.Flags().Changed("log-level") {
		a.logLevel = slog.LevelInfo
	}
	k := &keeper{
		app: a, options: o, log: a.logger(),
		probes: f.probes, daemonSet: f.daemonSet, kubeconfig: f.kubeconfig, merged: make(chan struct{}, 1),
	}
	k.options.Logger, k.options.Pins.Logger = k.log, k.log
	k.options.Step = func(what string) { k.log.Info(what) }
	var owner *daemonSet
	if k.daemonSet != "" {
		var err error
		if owner, err = newDaemonSet(k.kubeconfig, k.daemonSet, k.log); err != nil {
			return err
		}
	}
	if owner == nil {
		return k.run(cmd.Context())
	}
	// It goes on to be followed when the installer is told to end.
	ctx, cancel := context.WithCancel(context.WithoutCancel(cmd.Context()))
	var following sync.WaitGroup
	following.Go(func() { owner.follow(ctx) })
	err := k.run(cmd.Context())
	if err == nil {
		err = k.end(ctx, owner)
	}
	cancel()
	following.Wait()
	return err
}

// run returns nil when ctx is done.
func (k *keeper) run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	health := &installed{err: errors.New("not installed yet")}
	g.Go(func() error {
		return install.Watcher{Options: k.options, Report: health.report, Merged: func(context.Context) {
			select {
			case k.merged <- struct{}{}:
			default:
			}
		}}.Watch(ctx)
	})
	g.Go(func() error {
		k.adopt(ctx)
		return nil
	})
	if k.probes != "" {
		g.Go(func() error { return metrics.Server{Health: health}.Serve(ctx, k.probes) })
	}
	return g.Wait()
}

// installed is whether podgate is part of the network.
type installed struct {
	mu  sync.Mutex
	err error
}

func (i *installed) report(err error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.err = err
}

// Alive is nil: a watcher that fails ends.
func (i *installed) Alive() error { return nil }

func (i *installed) Ready() error {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.err
}

const (
	// daemonPatience is how long a daemon may take to start, and policyPatience
	// how long to know policy, before containers are gated without.
	daemonPatience = 5 * time.Second
	policyPatience = time.Minute
	// adoptRetry is how long after a failure containers are looked for again.
	adoptRetry = 30 * time.Second
)

// adopt gates the containers that were started without a gate, whenever there
// may be some.
func (k *keeper) adopt(ctx context.Context) {
	var retry <-chan time.Time
	for {
		select {
		case <-ctx.Done():
			return
		case <-k.merged:
		case <-retry:
		}
		retry = nil
		k.awaitPolicy(ctx)
		if err := k.adoptNow(ctx); err != nil && ctx.Err() == nil {
			k.log.Error("containers may be without a gate", "error", err)
			retry = time.After(adoptRetry)
		}
	}
}

// awaitPolicy waits for the daemon, so that a container's policy is known when
// its gate is made.
func (k *keeper) awaitPolicy(ctx context.Context) {
	began := time.Now()
	for {
		s, running, err := k.daemon()
		if err == nil && running && s != nil && !s.Synced.IsZero() {
			return
		}
		patience := daemonPatience
		if running {
			patience = policyPatience
		}
		if time.Since(began) > patience {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(200 * time.Millisecond):
		}
	}
}

func (k *keeper) adoptNow(ctx context.Context) error {
	o := k.options
	adopted, err := install.Adopt(ctx, install.AdoptOptions{
		ConfDir: o.ConfDir, BinDir: o.BinDir, CacheDir: o.CacheDir, Pins: o.Pins,
	})
	for _, c := range adopted {
		if c.Error != "" {
			k.log.Error("container stays without a gate", "container", c, "pod", c.Pod, "network", c.Network, "error", c.Error)
		} else {
			k.log.Info("container gated that was started before", "container", c, "pod", c.Pod, "network", c.Network, "connections", c.Connections)
		}
	}
	return err
}

const (
	// askTimeout is how long the API server may take to say whether the
	// DaemonSet is there, removeTimeout how long it may take to remove podgate.
	// Together they are less than the pod has to end.
	askTimeout    = 10 * time.Second
	removeTimeout = 40 * time.Second
)

// end takes podgate off the node if its DaemonSet is gone. A pod that ends for
// another reason, an upgrade or a drain, leaves everything in force.
func (k *keeper) end(ctx context.Context, owner *daemonSet) error {
	ask, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	gone, err := owner.deleted(ask)
	if err != nil {
		k.log.Warn("nobody knows whether podgate was deleted: it stays in force", "daemonset", owner, "error", err)
		return nil
	}
	if !gone {
		k.log.Info("podgate stays in force", "daemonset", owner)
		return nil
	}
	k.log.Info("podgate was deleted: it is taken off this node", "daemonset", owner)
	ctx, cancel = context.WithTimeout(ctx, removeTimeout)
	defer cancel()
	return k.remove(ctx)
}

// remove uninstalls once the daemon, which is told to end at the same time, has.
func (k *keeper) remove(ctx context.Context) error {
	for {
		left, err := install.Uninstall(ctx, k.options)
		for _, l := range left {
			k.log.Warn("left", "what", l)
		}
		if !errors.Is(err, install.ErrRunning) && !errors.Is(err, install.ErrWatched) {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", err, ctx.Err())
		case <-time.After(100 * time.Millisecond):
		}
	}
}
