// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package pinning

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/vishvananda/netlink"

	"github.com/podgate/podgate/bpf"
)

// ServiceState is how packets to Services are judged.
type ServiceState struct {
	Mode ServicesMode
	// Frontends that lead to a Service.
	Frontends int
}

// ServiceState reads it, and returns an error for what keeps Services from
// being translated and judged as they should be. It is called in the node's
// network namespace.
func (s *State) ServiceState() (ServiceState, error) {
	mode, err := s.ServicesMode()
	if err != nil || mode == ServicesNone {
		return ServiceState{Mode: mode}, err
	}
	m, err := s.m(bpf.DatapathMapFrontends)
	if err != nil {
		return ServiceState{Mode: mode}, err
	}
	n, err := count(m)
	if err == nil && n > 0 {
		err = s.unseenBridges()
	}
	return ServiceState{mode, n}, err
}

// unseenBridges finds pods on a bridge whose packets netfilter does not see:
// answers to who reached a neighbour through a Service are not translated back,
// and after_nat does not see what stays on the link.
func (s *State) unseenBridges() error {
	bridge, err := s.bridge()
	if err != nil || bridge == "" {
		return err
	}
	for _, family := range []string{"iptables", "ip6tables"} {
		path := "/proc/sys/net/bridge/bridge-nf-call-" + family
		b, err := os.ReadFile(path)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("pods on bridge %s: %w", bridge, err)
		}
		if strings.TrimSpace(string(b)) != "1" {
			return fmt.Errorf("%w: pods are on bridge %s, and %s is not 1 (or br_netfilter is not loaded): Services of neighbours on it do not work, and are not judged", ErrDiffers, bridge, path)
		}
	}
	return nil
}

// bridge is one that endpoints are on, "" if there is none.
func (s *State) bridge() (string, error) {
	for e, err := range s.Endpoints() {
		if err != nil {
			return "", err
		}
		l, err := netlink.LinkByIndex(e.HostIfindex)
		if isNoLink(err) || err == nil && l.Attrs().MasterIndex == 0 {
			continue
		}
		if err != nil {
			return "", fmt.Errorf("interface %d: %w", e.HostIfindex, err)
		}
		master, err := netlink.LinkByIndex(l.Attrs().MasterIndex)
		if isNoLink(err) || err == nil && master.Type() != "bridge" {
			continue
		}
		if err != nil {
			return "", fmt.Errorf("interface %d: %w", l.Attrs().MasterIndex, err)
		}
		return master.Attrs().Name, nil
	}
	return "", nil
}
