// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"time"

	"github.com/podgate/podgate/conf"
	"github.com/podgate/podgate/pinning"
)

// lockTimeout bounds the wait for other calls on the node. Each holds the lock
// for milliseconds as a rule, but while it attaches it waits for the kernel's
// RTNL lock, of which every other network change on the node takes its share.
// Runtimes give up on a pod after two to four minutes.
const lockTimeout = time.Minute

// options of the pinned state that an attachment belongs to.
func options(i conf.Instance, logger *slog.Logger) pinning.Options {
	return pinning.Options{
		Layout:      pinning.Layout{BPFFS: i.BPFFS, Name: i.Instance},
		Capacity:    pinning.Capacity(i.Capacity),
		Logger:      logger,
		LockTimeout: lockTimeout,
	}
}

// ensure adopts the pinned state, or makes it when this is the first call after
// boot.
func (c *call) ensure(ctx context.Context, o pinning.Options) (*pinning.State, error) {
	state, err := pinning.Open(ctx, o)
	if errors.Is(err, pinning.ErrNotInstalled) {
		o.Logger.Info("no pinned state, making it", "bpffs", o.Layout.BPFFS, "instance", o.Layout.Name)
		return pinning.Ensure(ctx, o)
	}
	return state, err
}

// logger writes to the configured file, or to stderr when there is none or it
// cannot be opened: a pod does not fail for want of a log.
func (c *call) logger(l conf.Log) (*slog.Logger, func()) {
	w, closer := c.stderr, func() {}
	var failed error
	if l.LogFile != "" {
		f, err := os.OpenFile(l.LogFile, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
		if err == nil {
			w, closer = f, func() { f.Close() }
		}
		failed = err
	}
	logger := slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: l.LogLevel}))
	if failed != nil {
		logger.Warn("logging to stderr", "error", failed)
	}
	return logger, closer
}
