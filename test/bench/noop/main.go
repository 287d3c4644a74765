// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

// Command noop is the CNI plugin that podgate-cni is measured against: it links
// what any plugin with eBPF links, reads its configuration, passes prevResult
// on and does nothing else.
package main

import (
	"encoding/json"
	"fmt"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"

	_ "github.com/cilium/ebpf/link"
	_ "github.com/vishvananda/netlink"
)

func main() {
	skel.PluginMainFuncs(skel.CNIFuncs{Add: add, Del: del}, version.All, "noop")
}

func add(args *skel.CmdArgs) error {
	n, err := parse(args)
	if err != nil {
		return err
	}
	return types.PrintResult(n.PrevResult, n.CNIVersion)
}

func del(args *skel.CmdArgs) error {
	_, err := parse(args)
	return err
}

func parse(args *skel.CmdArgs) (*types.PluginConf, error) {
	n := &types.PluginConf{}
	if err := json.Unmarshal(args.StdinData, n); err != nil {
		return nil, fmt.Errorf("network configuration: %w", err)
	}
	if err := version.ParsePrevResult(n); err != nil {
		return nil, fmt.Errorf("prevResult: %w", err)
	}
	return n, nil
}
