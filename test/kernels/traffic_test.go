// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/podgate/podgate/bpf/policy"
	"github.com/podgate/podgate/pinning"
	"github.com/podgate/podgate/test/netlab"
)

const (
	allowedPort = 5001
	deniedPort  = 5002
)

// TestTraffic sends real packets between two pods, one of which takes them on
// one port only, with each kind of hook that the kernel has.
func TestTraffic(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("network namespaces and BPF need root")
	}
	plugins := t.TempDir()
	if err := netlab.Build(t.Context(), plugins); err != nil {
		t.Fatal(err)
	}
	hasTCX, err := netlab.HasTCX()
	if err != nil {
		t.Fatal(err)
	}
	for _, attach := range []pinning.AttachKind{pinning.AttachClsact, pinning.AttachTCX} {
		t.Run(attach.String(), func(t *testing.T) {
			if attach == pinning.AttachTCX && !hasTCX {
				t.Skip("tcx came with Linux 6.6")
			}
			testTraffic(t, plugins, attach)
		})
	}
}

func testTraffic(t *testing.T, plugins string, attach pinning.AttachKind) {
	node, err := netlab.New(netlab.Options{Plugins: plugins, Stderr: t.Output()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { must(t, node.Close()) })
	list := netlab.Conflist{CNIVersion: "1.1.0", Name: "lab", Plugins: []netlab.Plugin{
		node.Bridge("br0", "10.61.0.0/24", "fd61::/64"),
		node.Podgate().With(netlab.Plugin{"attach": attach.String()}),
	}}
	server, serverAddrs := addPod(t, node, list, "server")
	client, clientAddrs := addPod(t, node, list, "client")

	options := pinning.Options{
		Layout: pinning.Layout{BPFFS: node.BPFFS},
		Logger: slog.New(slog.NewTextHandler(t.Output(), nil)),
	}
	s, err := pinning.Open(t.Context(), options)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { must(t, s.Close()) })
	for e, err := range s.Endpoints() {
		if err != nil {
			t.Fatal(err)
		}
		if e.Attach != attach {
			t.Errorf("%s is attached by %s", e.PodName, e.Attach)
		}
	}
	if _, err := s.Apply(t.Context(), oneOpenPort(t, serverAddrs, clientAddrs)); err != nil {
		t.Fatal(err)
	}

	for _, a := range serverAddrs {
		for _, port := range []uint16{allowedPort, deniedPort} {
			to := netip.AddrPortFrom(a, port)
			echoTCP(t, server, to)
			echoUDP(t, server, to)
		}
	}
	for _, a := range serverAddrs {
		for _, c := range []struct {
			network string
			port    uint16
			bytes   int
			passes  bool
		}{
			{"tcp", allowedPort, 100_000, true},
			{"tcp", deniedPort, 1, false},
			{"udp", allowedPort, 1, true},
			{"udp", allowedPort, 4000, true}, // in fragments
			{"udp", deniedPort, 1, false},
			{"udp", deniedPort, 4000, false},
		} {
			to := netip.AddrPortFrom(a, c.port)
			t.Run(fmt.Sprintf("%s %s %d bytes", c.network, to, c.bytes), func(t *testing.T) {
				wait := 10 * time.Second
				if !c.passes {
					// Nothing but waiting shows that nothing comes.
					wait = 500 * time.Millisecond
				}
				err := echo(client, c.network, to, c.bytes, wait)
				if c.passes && err != nil {
					t.Errorf("did not pass: %v", err)
				}
				if !c.passes && err == nil {
					t.Error("passed")
				}
			})
		}
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Error(err)
	}
}

func addPod(t *testing.T, node *netlab.Node, list netlab.Conflist, name string) (*netlab.Pod, []netip.Addr) {
	t.Helper()
	p, result, err := node.AddPod(t.Context(), list, netlab.PodSpec{Namespace: "default", Name: name, UID: name})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { must(t, node.DelPod(context.Background(), p)) })
	var addrs []netip.Addr
	for _, ip := range result.IPs {
		a, _ := netip.AddrFromSlice(ip.Address.IP)
		addrs = append(addrs, a.Unmap())
	}
	return p, addrs
}

// oneOpenPort isolates the server but for one port.
func oneOpenPort(t *testing.T, server, client []netip.Addr) policy.Update {
	t.Helper()
	compiler := policy.NewCompiler()
	compiler.SetNamespace(policy.Namespace{Name: "default"})
	err := errors.Join(
		compiler.SetPod(policy.Pod{
			Key: "server", UID: "server", Namespace: "default", Name: "server",
			Labels: map[string]string{"app": "server"}, Addresses: server, Local: true,
		}),
		compiler.SetPod(policy.Pod{
			Key: "client", UID: "client", Namespace: "default", Name: "client", Addresses: client, Local: true,
		}),
		compiler.SetPolicy(policy.Policy{
			UID: "one-port", Kind: "NetworkPolicy", Namespace: "default", Name: "one-port", Tier: policy.TierNamespace,
			Subject: policy.PodSelector{
				Namespace: "default",
				Pods:      policy.Selector{{Key: "app", Operator: policy.In, Values: []string{"server"}}},
			},
			Isolates: [2]bool{policy.Ingress: true},
			Rules: [2][]policy.Rule{policy.Ingress: {{
				Action: policy.Allow, AnyPeer: true,
				Ports: []policy.Port{
					{Protocol: policy.TCP, First: allowedPort, Last: allowedPort},
					{Protocol: policy.UDP, First: allowedPort, Last: allowedPort},
				},
			}}},
		}))
	if err != nil {
		t.Fatal(err)
	}
	return compiler.Compile()
}

func echoTCP(t *testing.T, p *netlab.Pod, at netip.AddrPort) {
	t.Helper()
	var l net.Listener
	err := p.Do(func() (err error) {
		l, err = net.Listen("tcp", at.String())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { must(t, l.Close()) })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				_, _ = io.Copy(c, c)
				_ = c.Close()
			}()
		}
	}()
}

func echoUDP(t *testing.T, p *netlab.Pod, at netip.AddrPort) {
	t.Helper()
	var c net.PacketConn
	err := p.Do(func() (err error) {
		c, err = net.ListenPacket("udp", at.String())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { must(t, c.Close()) })
	go func() {
		b := make([]byte, 65536)
		for {
			n, from, err := c.ReadFrom(b)
			if err != nil {
				return
			}
			_, _ = c.WriteTo(b[:n], from)
		}
	}()
}

// echo sends bytes from a pod and waits until all of them are back.
func echo(p *netlab.Pod, network string, to netip.AddrPort, bytes int, wait time.Duration) error {
	return p.Do(func() error {
		c, err := net.DialTimeout(network, to.String(), wait)
		if err != nil {
			return err
		}
		defer func() { _ = c.Close() }()
		if err := c.SetDeadline(time.Now().Add(wait)); err != nil {
			return err
		}
		sent := make(chan error, 1)
		go func() {
			_, err := c.Write(make([]byte, bytes))
			sent <- err
		}()
		b := make([]byte, bytes)
		if network == "udp" {
			n, err := c.Read(b)
			if err == nil && n != bytes {
				err = fmt.Errorf("%d bytes came back, not %d", n, bytes)
			}
			return errors.Join(err, <-sent)
		}
		_, err = io.ReadFull(c, b)
		return errors.Join(err, <-sent)
	})
}
