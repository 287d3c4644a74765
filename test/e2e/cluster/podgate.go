// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package cluster

import (
	"context"
	_ "embed" // manifests
	"path/filepath"
)

// podgateRBAC is what podgate may read.
//
//go:embed manifests/podgate.yaml
var podgateRBAC string

// startPodgate starts the daemon of a node.
func (n *Node) startPodgate() error {
	c := n.cluster
	if c.Bare {
		return nil
	}
	args := []string{"sync", "--node-name", n.Name, "--metrics", "127.0.0.1:9966"}
	if c.PolicyDir != "" {
		args = append(args, "--policy-dir", c.PolicyDir)
	} else {
		args = append(args, "--kubeconfig", "/etc/kubernetes/podgate.conf")
	}
	var err error
	n.Podgate, err = n.Start("podgate", Command{Path: "/opt/cni/bin/podgate", Args: args})
	return err
}

// PodgateCommand runs podgate on the node and returns what it prints.
func (n *Node) PodgateCommand(ctx context.Context, args ...string) ([]byte, error) {
	return n.Exec(ctx, filepath.Join("/opt/cni/bin", "podgate"), args...)
}
