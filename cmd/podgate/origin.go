// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/podgate/podgate/syncd/apiserver"
	"github.com/podgate/podgate/syncd/source"
	"github.com/podgate/podgate/syncd/status"
)

// origin is where policy comes from.
type origin struct{ status.Origin }

// complete fills in what was left out, so that other processes, which have
// another environment, can open the same.
func (o *origin) complete(getenv func(string) string) error {
	if o.empty() {
		return errors.New("neither --kubeconfig nor --policy-dir names anything")
	}
	return o.completeNode(getenv)
}

// completeNode is complete for an origin that may name nothing.
func (o *origin) completeNode(getenv func(string) string) (err error) {
	if o.Node = cmp.Or(o.Node, getenv("NODE_NAME")); o.Node == "" {
		if o.Node, err = os.Hostname(); err != nil {
			return fmt.Errorf("node name: %w", err)
		}
	}
	for _, path := range []*string{&o.PolicyDir, &o.Kubeconfig} {
		if *path == "" || *path == apiserver.InCluster {
			continue
		}
		if *path, err = filepath.Abs(*path); err != nil {
			return err
		}
	}
	return nil
}

// unlisted tells whether there may be pods here of which the source knows
// nothing. An API server knows all.
func (o *origin) unlisted() bool { return o.Kubeconfig == "" }

// open makes the source. The options are those of a directory, if it is one.
func (o *origin) open(dir source.DirectoryOptions, logger *slog.Logger) (source.Source, error) {
	if o.Kubeconfig == "" {
		dir.Path, dir.Logger = o.PolicyDir, logger
		return source.NewDirectory(dir), nil
	}
	config, err := apiserver.Config(o.Kubeconfig, "podgate/"+version)
	if err != nil {
		return nil, err
	}
	o.APIServer = config.Host
	return apiserver.New(apiserver.Options{Config: config, Node: o.Node, Logger: logger})
}

// empty tells whether nothing is named.
func (o *origin) empty() bool { return o.PolicyDir == "" && o.Kubeconfig == "" }

// notifier is what tells others of problems, if the source has somewhere to.
func notifier(s source.Source) func(source.Problem) {
	if s, ok := s.(interface{ Notify(p source.Problem) }); ok {
		return s.Notify
	}
	return nil
}
