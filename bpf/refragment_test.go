// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package bpf_test

import (
	"errors"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podgate/podgate/test/need"
)

// TestRefragmented sends datagrams that a node with connection tracking puts
// together and takes apart again. The kernel may make new packets for that,
// and those of IPv6 do not say through which interface the old ones came
// (ip6_copy_metadata): they are not the node's own for that.
func TestRefragmented(t *testing.T) {
	need.Tools(t, "nft")
	for name, bridged := range map[string]bool{"bridged": true, "routed": false} {
		t.Run(name, func(t *testing.T) {
			s := newStreet(t, bridged)
			s.track(bridged)
			s.enforce(webPolicy())
			web, got := s.pods["web"], make(chan netip.AddrPort, 16)
			s.hear(web, 8053, got)
			for _, a := range []netip.Addr{web.v4, web.v6} {
				c, err := dial(s, "udp", netip.AddrPortFrom(a, 8053), patience(true))
				s.must(err)
				_, err = c.Write(make([]byte, 4000))
				s.must(errors.Join(err, c.Close()))
				s.heard("the node's", got, true)
			}
			for name, allowed := range map[string]bool{"client": true, "stranger": false} {
				s.must(s.pods[name].disassemble(web.host, 8053))
				s.heard(name+"'s", got, allowed)
			}
		})
	}
}

// track has the node look at connections, which takes whole packets.
func (s *street) track(bridged bool) {
	s.t.Helper()
	s.must(s.Do(func() error {
		nft := exec.Command("nft", "-f", "-")
		nft.Stdin = strings.NewReader("table inet t { chain c { type filter hook forward priority 0; ct state new counter; }; }\n")
		return nft.Run()
	}))
	if bridged {
		s.must(s.Do(callIPTables))
	}
}

// hear tells from where datagrams come.
func (s *street) hear(in doer, port int, got chan<- netip.AddrPort) {
	s.t.Helper()
	var u *net.UDPConn
	s.must(in.Do(func() (err error) {
		u, err = net.ListenUDP("udp", &net.UDPAddr{Port: port})
		return err
	}))
	s.t.Cleanup(func() { _ = u.Close() })
	go func() {
		for b := make([]byte, 1<<16); ; {
			_, from, err := u.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			got <- from
		}
	}()
}

func (s *street) heard(what string, got <-chan netip.AddrPort, allowed bool) {
	s.t.Helper()
	select {
	case from := <-got:
		if !allowed {
			s.t.Errorf("%s datagram from %s gets through", what, from)
		}
	case <-time.After(patience(allowed)):
		if allowed {
			s.t.Errorf("%s datagram does not get through", what)
		}
	}
}

// disassemble sends a datagram over IPv6 in two fragments. The first has a
// header more than the second, which is therefore too long for the kernel to
// send it as it came.
func (p *resident) disassemble(to host, port uint16) error {
	const second = 1448
	way := path{p.host, to}
	whole := way.datagram(true, 40000, port, make([]byte, 8+second))
	return p.Do(func() error {
		fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		if err != nil {
			return err
		}
		defer func() { _ = unix.Close(fd) }()
		for _, packet := range [][]byte{
			way.packet6(destination, 64, extension(fragmented, []byte{1, 4}, fragment6(udp17, 1, 0, true, whole[:16]))),
			way.packet6(fragmented, 64, fragment6(udp17, 1, 16, false, whole[16:])),
		} {
			if err := unix.Sendto(fd, packet, 0, &unix.SockaddrInet6{Addr: to.v6.As16()}); err != nil {
				return err
			}
		}
		return nil
	})
}
