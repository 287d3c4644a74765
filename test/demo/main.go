// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

// Command demo shows podgate at work on this machine: pods made by the bridge
// plugin through libcni, real connections between them, a NetworkPolicy that
// comes into force, the death of the daemon. It runs in namespaces of its own,
// leaves nothing behind and says so. It fails when anything is not as it should
// be, so it is a test as well.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/podgate/podgate/test/netlab"
)

func main() {
	bin := flag.String("bin", "bin", "directory with podgate and podgate-cni")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, *bin)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, bin string) (err error) {
	if os.Getuid() != 0 {
		return errors.New("network namespaces and eBPF need root")
	}
	plugins, err := os.MkdirTemp("", "podgate-demo-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(plugins)) }()
	if err := netlab.BuildReference(ctx, plugins); err != nil {
		return err
	}
	bin, err = filepath.Abs(bin)
	if err != nil {
		return err
	}
	if err := os.Symlink(filepath.Join(bin, "podgate-cni"), filepath.Join(plugins, "podgate-cni")); err != nil {
		return err
	}
	l, err := newLab(plugins)
	if err != nil {
		return err
	}
	s := &story{
		style:   newStyle(os.Stdout),
		lab:     l,
		podgate: &command{lab: l, binary: filepath.Join(bin, "podgate")},
	}
	return errors.Join(s.tell(ctx), s.end())
}
