// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

// Command cluster builds what a Kubernetes cluster is made of, and runs one to
// look at:
//
//	go run ./cmd/cluster -build    # half an hour, once
//	go run ./cmd/cluster -check    # is it built?
//	go run ./cmd/cluster           # as root, until it is interrupted
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/podgate/podgate/test/e2e/build"
	"github.com/podgate/podgate/test/e2e/cluster"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "cluster:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	options := cluster.Options{Log: log}
	flag.IntVar(&options.Nodes, "nodes", 2, "number of nodes besides the control plane")
	flag.StringVar(&options.Proxy, "proxy", "nftables", "mode of kube-proxy: nftables or iptables")
	flag.BoolVar(&options.Bare, "bare", false, "leave podgate out")
	flag.StringVar(&options.PolicyDir, "policy-dir", "", "have podgate read policy from a directory instead of the API server")
	source := flag.String("source", ".", "directory of the module test/e2e")
	only := flag.Bool("build", false, "build and exit")
	check := flag.Bool("check", false, "exit, with an error unless everything is built")
	flag.Parse()

	cache, err := build.Open(filepath.Join(*source, "build"), log)
	if err != nil {
		return err
	}
	if *check {
		return cache.Check()
	}
	if err := cache.Build(ctx); err != nil || *only {
		return err
	}
	return up(ctx, cache, options, *source)
}

// up runs a cluster until ctx is done.
func up(ctx context.Context, cache *build.Cache, o cluster.Options, source string) (err error) {
	o.Bin, o.Images = cache.Bin(), cache.Images()
	if o.Plugins, err = os.MkdirTemp("", "podgate-e2e-plugins-"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(o.Plugins)) }()
	if o.PolicyDir != "" {
		if o.PolicyDir, err = filepath.Abs(o.PolicyDir); err != nil {
			return err
		}
	}
	if err := os.Chdir(filepath.Join(source, "..", "..")); err != nil {
		return err
	}
	if err := cluster.Plugins(ctx, o.Plugins); err != nil {
		return err
	}
	c, err := cluster.Start(ctx, o)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	fmt.Printf("kubectl:  nsenter -t %d -n %s --kubeconfig %s\n",
		c.ControlPlane.PID(), filepath.Join(c.Bin, "kubectl"), c.Kubeconfig)
	for _, n := range c.Nodes {
		fmt.Printf("node %s:  nsenter -t %d -m -u -i -n -p bash\n", n.Name, n.PID())
	}
	fmt.Printf("logs:     %s\nCtrl-C ends it.\n", c.Dir)
	<-ctx.Done()
	return nil
}
