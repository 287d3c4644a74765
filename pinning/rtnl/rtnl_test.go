// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package rtnl_test

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/podgate/podgate/pinning/rtnl"
	"github.com/podgate/podgate/test/netlab"
)

func newNode(t *testing.T) *netlab.Node {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("network namespaces need root")
	}
	node, err := netlab.New(netlab.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := node.Close(); err != nil {
			t.Error(err)
		}
	})
	return node
}

// addBridge makes one with an address.
func addBridge(name, address string) error {
	l := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: name}}
	if err := netlink.LinkAdd(l); err != nil {
		return err
	}
	a, err := netlink.ParseAddr(address)
	if err != nil {
		return err
	}
	return netlink.AddrAdd(l, a)
}

func linkOf(t *testing.T, a rtnl.Answer) *netlink.LinkAttrs {
	t.Helper()
	if a.Err != nil || len(a.Messages) != 1 {
		t.Fatalf("answer is %v with %d messages, want one link", a.Err, len(a.Messages))
	}
	l, err := netlink.LinkDeserialize(nil, a.Messages[0])
	if err != nil {
		t.Fatal(err)
	}
	return l.Attrs()
}

func addressesOf(t *testing.T, a rtnl.Answer) (out []string) {
	t.Helper()
	if a.Err != nil {
		t.Fatal(a.Err)
	}
	for _, m := range a.Messages {
		address, err := rtnl.ParseAddress(m)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, address.String())
	}
	slices.Sort(out)
	return out
}

func TestRequestsInOneDatagram(t *testing.T) {
	node := newNode(t)
	err := node.Do(func() error {
		if err := errors.Join(addBridge("br0", "192.0.2.1/24"), addBridge("br1", "192.0.2.2/24")); err != nil {
			return err
		}
		s, err := rtnl.Open()
		if err != nil {
			return err
		}
		defer s.Close()
		if err := s.Strict(); err != nil {
			return err
		}
		for range 2 {
			answers, err := s.Do(rtnl.Link(0, "br0"), rtnl.Link(0, "none"), rtnl.Link(0, "br1"), rtnl.Addresses(0))
			if err != nil {
				return err
			}
			if br0 := linkOf(t, answers[0]); br0.Name != "br0" {
				t.Errorf("first answer is %s", br0.Name)
			}
			if !errors.Is(answers[1].Err, unix.ENODEV) || len(answers[1].Messages) != 0 {
				t.Errorf("second answer is %+v", answers[1])
			}
			br1 := linkOf(t, answers[2])
			all := addressesOf(t, answers[3])
			for _, want := range []string{"192.0.2.1", "192.0.2.2"} {
				if !slices.Contains(all, want) {
					t.Errorf("addresses are %s, want %s too", all, want)
				}
			}
			if answers, err = s.Do(rtnl.Addresses(br1.Index), rtnl.Link(br1.Index, "")); err != nil {
				return err
			}
			if got := addressesOf(t, answers[0]); !slices.Equal(got, []string{"192.0.2.2"}) {
				t.Errorf("addresses of br1 are %s", got)
			}
			if by := linkOf(t, answers[1]); by.Name != "br1" {
				t.Errorf("interface %d is %s", br1.Index, by.Name)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// waitLocal waits for the kernel to deliver what is sent to a new address: for
// one of IPv6 its address work queue enters the route.
func waitLocal(l netlink.Link, address net.IP) error {
	filter := &netlink.Route{
		LinkIndex: l.Attrs().Index, Table: unix.RT_TABLE_LOCAL, Dst: netlink.NewIPNet(address),
	}
	for range 500 {
		routes, err := netlink.RouteListFiltered(netlink.FAMILY_V6, filter,
			netlink.RT_FILTER_OIF|netlink.RT_FILTER_TABLE|netlink.RT_FILTER_DST)
		if err != nil {
			return err
		}
		if len(routes) > 0 {
			return nil
		}
		time.Sleep(10 * time.Millisecond)
	}
	return fmt.Errorf("no local route to %s after 5 s", address)
}

func TestRoutes(t *testing.T) {
	node := newNode(t)
	err := node.Do(func() error {
		if err := addBridge("br0", "192.0.2.1/24"); err != nil {
			return err
		}
		l, err := netlink.LinkByName("br0")
		if err != nil {
			return err
		}
		six, err := netlink.ParseAddr("2001:db8::1/64")
		if err != nil {
			return err
		}
		six.Flags = unix.IFA_F_NODAD
		if err := errors.Join(netlink.AddrAdd(l, six), netlink.LinkSetUp(l)); err != nil {
			return err
		}
		if err := waitLocal(l, six.IP); err != nil {
			return err
		}
		s, err := rtnl.Open()
		if err != nil {
			return err
		}
		defer s.Close()
		if err := s.Strict(); err != nil {
			return err
		}
		for address, want := range map[string]bool{
			"192.0.2.1": true, "2001:db8::1": true, "192.0.2.2": false, "2001:db8::2": false, "198.51.100.1": false,
		} {
			answers, err := s.Do(rtnl.Route(netip.MustParseAddr(address)))
			if err != nil {
				return err
			}
			a := answers[0]
			if got := a.Err == nil && len(a.Messages) == 1 && rtnl.IsLocal(a.Messages[0]); got != want {
				t.Errorf("%s is local: %t, %+v", address, got, a)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// A dump of more than one message's worth comes whole.
func TestLongDump(t *testing.T) {
	const n = 1000
	node := newNode(t)
	err := node.Do(func() error {
		if err := addBridge("br0", "192.0.2.1/24"); err != nil {
			return err
		}
		l, err := netlink.LinkByName("br0")
		if err != nil {
			return err
		}
		for i := range n {
			ip := netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)})
			a, err := netlink.ParseAddr(ip.String() + "/32")
			if err != nil {
				return err
			}
			if err := netlink.AddrAdd(l, a); err != nil {
				return err
			}
		}
		s, err := rtnl.Open()
		if err != nil {
			return err
		}
		defer s.Close()
		answers, err := s.Do(rtnl.Addresses(0))
		if err != nil {
			return err
		}
		if got := addressesOf(t, answers[0]); len(got) < n {
			t.Errorf("%d addresses, want %d", len(got), n)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestOtherNetworkNamespace(t *testing.T) {
	home, other := newNode(t), newNode(t)
	if err := other.Do(func() error { return addBridge("there", "192.0.2.1/24") }); err != nil {
		t.Fatal(err)
	}
	err := home.Do(func() error {
		here, err := netns.Get()
		if err != nil {
			return err
		}
		defer here.Close()
		there, err := netns.GetFromPath(other.NetNS())
		if err != nil {
			return err
		}
		defer there.Close()
		s, err := rtnl.OpenAt(there, here)
		if err != nil {
			return err
		}
		defer s.Close()
		answers, err := s.Do(rtnl.Link(0, "there"), rtnl.NetNSID(here))
		if err != nil {
			return err
		}
		linkOf(t, answers[0])
		if answers[1].Err != nil || len(answers[1].Messages) != 1 {
			t.Fatalf("answer is %+v", answers[1])
		}
		if id, err := rtnl.ParseNetNSID(answers[1].Messages[0]); err != nil || id != -1 {
			t.Errorf("a namespace that nothing leads to has number %d, %v", id, err)
		}
		if now, err := netns.Get(); err != nil || !now.Equal(here) {
			t.Errorf("the thread is not where it was: %v", err)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func message(header int, kind int, value []byte) []byte {
	return append(make([]byte, header), nl.NewRtAttr(kind, value).Serialize()...)
}

func TestMalformed(t *testing.T) {
	for name, m := range map[string][]byte{
		"empty":               {},
		"half a header":       make([]byte, 3),
		"attribute too long":  append(make([]byte, 8), 200, 0, 1, 0),
		"attribute too short": append(make([]byte, 8), 1, 0, 1, 0),
	} {
		if _, err := rtnl.ParseAddress(m); !errors.Is(err, rtnl.ErrMalformed) {
			t.Errorf("address, %s: %v", name, err)
		}
		if _, err := rtnl.ParseNetNSID(m); !errors.Is(err, rtnl.ErrMalformed) {
			t.Errorf("namespace number, %s: %v", name, err)
		}
	}
	if _, err := rtnl.ParseNetNSID(message(4, netlink.NETNSA_NSID, []byte{1})); !errors.Is(err, rtnl.ErrMalformed) {
		t.Errorf("namespace number of one byte: %v", err)
	}
}

// The node's own address wins over the other end's.
func TestAddressOfPointToPoint(t *testing.T) {
	m := message(8, unix.IFA_ADDRESS, []byte{192, 0, 2, 9})
	m = append(m, nl.NewRtAttr(unix.IFA_LOCAL, []byte{192, 0, 2, 1}).Serialize()...)
	if a, err := rtnl.ParseAddress(m); err != nil || a.Addr != netip.MustParseAddr("192.0.2.1") {
		t.Errorf("address is %s, %v", a, err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add(message(8, unix.IFA_LOCAL, []byte{192, 0, 2, 1}))
	f.Add(message(4, netlink.NETNSA_NSID, []byte{1, 0, 0, 0}))
	f.Fuzz(func(t *testing.T, m []byte) {
		if _, err := rtnl.ParseAddress(m); err != nil && !errors.Is(err, rtnl.ErrMalformed) {
			t.Error(err)
		}
		if _, err := rtnl.ParseNetNSID(m); err != nil && !errors.Is(err, rtnl.ErrMalformed) {
			t.Error(err)
		}
		rtnl.IsLocal(m)
	})
}
