// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package nodeaddr

import (
	"context"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/podgate/podgate/test/netlab"
)

// inNode runs fn in the node's network namespace.
func inNode(t *testing.T, node *netlab.Node, fn func() error) {
	t.Helper()
	if err := node.Do(fn); err != nil {
		t.Fatal(err)
	}
}

func addLink(t *testing.T, node *netlab.Node, name string) netlink.Link {
	t.Helper()
	link := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: name}}
	inNode(t, node, func() error {
		if err := netlink.LinkAdd(link); err != nil {
			return err
		}
		return netlink.LinkSetUp(link)
	})
	return link
}

func addAddr(t *testing.T, node *netlab.Node, name, addr string) {
	t.Helper()
	inNode(t, node, func() error {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		a, err := netlink.ParseAddr(addr)
		if err != nil {
			return err
		}
		return netlink.AddrAdd(link, a)
	})
}

// global leaves out link-local addresses, which the kernel makes up.
func global(addrs []netip.Addr) (out []string) {
	for _, a := range addrs {
		if !a.IsLinkLocalUnicast() {
			out = append(out, a.String())
		}
	}
	return out
}

func TestWatch(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root to make a network namespace")
	}
	node, err := netlab.New(netlab.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer node.Close()
	addAddr(t, node, "lo", "192.0.2.9/32")
	link := addLink(t, node, "n0")
	addAddr(t, node, "n0", "192.0.2.1/24")
	addAddr(t, node, "n0", "2001:db8::1/64")
	addLink(t, node, serviceInterface)
	addAddr(t, node, serviceInterface, "10.96.0.1/32")

	ctx, cancel := context.WithCancel(t.Context())
	addrs := make(chan []netip.Addr, 10)
	done := make(chan error, 1)
	go func() {
		done <- node.Do(func() error {
			return Watch(ctx, slog.New(slog.DiscardHandler), func(a []netip.Addr) { addrs <- a })
		})
	}()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Watch: %v", err)
		}
	}()
	expect := func(want ...string) {
		t.Helper()
		timeout := time.After(10 * time.Second)
		var last []string
		for {
			select {
			case a := <-addrs:
				if last = global(a); slices.Equal(last, want) {
					return
				}
			case <-timeout:
				t.Fatalf("addresses %v, want %v", last, want)
			}
		}
	}
	expect("192.0.2.1", "192.0.2.9", "2001:db8::1")
	addAddr(t, node, "n0", "192.0.2.2/24")
	expect("192.0.2.1", "192.0.2.2", "192.0.2.9", "2001:db8::1")
	addAddr(t, node, serviceInterface, "10.96.0.2/32")
	inNode(t, node, func() error { return netlink.LinkDel(link) })
	expect("192.0.2.9")
}
