// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package netlab

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"path/filepath"
)

// Plugin is one plugin's object of a network configuration list.
type Plugin map[string]any

// With returns a copy of p with the keys of more added or replaced.
func (p Plugin) With(more Plugin) Plugin {
	c := maps.Clone(p)
	maps.Copy(c, more)
	return c
}

// JSON is the object as a plugin reads it.
func (p Plugin) JSON() ([]byte, error) {
	b, err := json.Marshal(p)
	if err != nil {
		return nil, fmt.Errorf("netlab: plugin: %w", err)
	}
	return b, nil
}

// Conflist is a network configuration list.
type Conflist struct {
	CNIVersion string   `json:"cniVersion"`
	Name       string   `json:"name"`
	Plugins    []Plugin `json:"plugins"`
}

// JSON is the list as libcni reads it.
func (c Conflist) JSON() ([]byte, error) {
	b, err := json.Marshal(c)
	if err != nil {
		return nil, fmt.Errorf("netlab: conflist %s: %w", c.Name, err)
	}
	return b, nil
}

// Bridge is the bridge plugin as a gateway, with an address of each subnet for
// the bridge and for every pod.
func (n *Node) Bridge(bridge string, subnets ...string) Plugin {
	return Plugin{
		"type":        "bridge",
		"bridge":      bridge,
		"isGateway":   true,
		"hairpinMode": true,
		"ipam":        n.HostLocal(subnets...),
	}
}

// PTP is the ptp plugin: a routed veth for every pod.
func (n *Node) PTP(subnets ...string) Plugin {
	return Plugin{"type": "ptp", "ipam": n.HostLocal(subnets...)}
}

// HostLocal is the host-local IPAM with one address of each subnet and default
// routes for the families it has.
func (n *Node) HostLocal(subnets ...string) Plugin {
	var ranges [][]Plugin
	var routes []Plugin
	for _, s := range subnets {
		ranges = append(ranges, []Plugin{{"subnet": s}})
		dst := "0.0.0.0/0"
		if p, err := netip.ParsePrefix(s); err == nil && p.Addr().Is6() {
			dst = "::/0"
		}
		routes = append(routes, Plugin{"dst": dst})
	}
	return Plugin{
		"type":    "host-local",
		"dataDir": filepath.Join(n.Dir, "host-local"),
		"ranges":  ranges,
		"routes":  routes,
	}
}

// Podgate is the podgate-cni entry for this node's bpffs.
func (n *Node) Podgate() Plugin {
	return Plugin{
		"type":         "podgate-cni",
		"bpffs":        n.BPFFS,
		"capabilities": map[string]bool{"bandwidth": true, "mac": true},
	}
}
