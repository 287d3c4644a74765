// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"
)

// profile has the daemon write what it says at a path of its own server to a file,
// if there is a directory for it.
func (n *node) profile(ctx context.Context, dir, path, name string) error {
	if dir == "" {
		return nil
	}
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, address string) (c net.Conn, err error) {
			err = n.Do(func() (err error) {
				c, err = (&net.Dialer{}).DialContext(ctx, network, address)
				return err
			})
			return c, err
		},
	}}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+daemonAddress+path, nil)
	if err != nil {
		return err
	}
	answer, err := client.Do(request)
	if err != nil {
		return err
	}
	defer func() { _ = answer.Body.Close() }() // it was only read
	b, err := io.ReadAll(answer.Body)
	if err != nil {
		return err
	}
	if answer.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s: %s", path, answer.Status, b)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, name), b, 0o644)
}

// profiled runs fn while the daemon's processor time is profiled.
func (n *node) profiled(ctx context.Context, dir, name string, during time.Duration, fn func(context.Context) error) error {
	g, ctx := errgroup.WithContext(ctx)
	if dir != "" {
		path := fmt.Sprintf("/debug/pprof/profile?seconds=%d", int(during.Seconds()))
		g.Go(func() error { return n.profile(ctx, dir, path, name) })
	}
	g.Go(func() error { return fn(ctx) })
	return g.Wait()
}
