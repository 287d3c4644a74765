// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package netlab

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podgate/podgate/test/need"
)

func newTestNode(t *testing.T) *Node {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("network namespaces and bpffs need root")
	}
	dir := t.TempDir()
	if err := BuildReference(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	n, err := New(Options{Plugins: dir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(n.Dir); !os.IsNotExist(err) {
			t.Errorf("scratch directory is still there: %v", err)
		}
	})
	return n
}

func TestPodsTalkOverTheBridge(t *testing.T) {
	n := newTestNode(t)
	list := Conflist{CNIVersion: "1.1.0", Name: "lab", Plugins: []Plugin{n.Bridge("br0", "10.61.0.0/24", "fd61::/64")}}

	server, result, err := n.AddPod(t.Context(), list, PodSpec{Namespace: "default", Name: "server", UID: "1"})
	if err != nil {
		t.Fatal(err)
	}
	client, _, err := n.AddPod(t.Context(), list, PodSpec{Namespace: "default", Name: "client", UID: "2"})
	if err != nil {
		t.Fatal(err)
	}
	if len(result.IPs) != 2 {
		t.Fatalf("server has addresses %v, want one of each family", result.IPs)
	}
	for _, ip := range result.IPs {
		address := ip.Address.IP.String()
		t.Run(address, func(t *testing.T) { connect(t, server, client, address) })
	}
	if err := n.Check(t.Context(), list, server); err != nil {
		t.Errorf("CHECK: %v", err)
	}
	if err := n.Status(t.Context(), list); err != nil {
		t.Errorf("STATUS: %v", err)
	}
	for _, p := range []*Pod{server, client} {
		netns := p.NetNS()
		if err := n.DelPod(t.Context(), p); err != nil {
			t.Errorf("DEL of %s: %v", p.Name, err)
		}
		if _, err := os.Stat(netns); !os.IsNotExist(err) {
			t.Errorf("network namespace of %s is still there: %v", p.Name, err)
		}
	}
	need.Tools(t, "ip")
	out, err := n.Exec(t.Context(), "ip", "-o", "link", "show", "type", "veth")
	if err != nil {
		t.Fatal(err)
	}
	if len(out) > 0 {
		t.Errorf("veths left on the node:\n%s", out)
	}
}

func connect(t *testing.T, server, client *Pod, address string) {
	t.Helper()
	var l net.Listener
	err := server.Do(func() (err error) {
		l, err = net.Listen("tcp", net.JoinHostPort(address, "0"))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	err = client.Do(func() error {
		c, err := net.DialTimeout("tcp", l.Addr().String(), 5*time.Second)
		if err != nil {
			return err
		}
		return c.Close()
	})
	if err != nil {
		t.Error(err)
	}
}

func TestNodesDoNotMeet(t *testing.T) {
	need.Tools(t, "ip")
	a, b := newTestNode(t), newTestNode(t)
	if err := os.Mkdir(filepath.Join(a.BPFFS, "mark"), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(b.BPFFS, "mark")); !os.IsNotExist(err) {
		t.Errorf("node b sees a's bpffs: %v", err)
	}
	if _, err := a.Exec(t.Context(), "ip", "link", "add", "mark", "type", "bridge"); err != nil {
		t.Fatal(err)
	}
	if out, err := b.Exec(t.Context(), "ip", "link", "show", "mark"); err == nil {
		t.Errorf("node b sees a's interface: %s", out)
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(b.BPFFS, &fs); err != nil || fs.Type != unix.BPF_FS_MAGIC {
		t.Errorf("%s is of type %#x (%v), want a bpffs", b.BPFFS, fs.Type, err)
	}
}

func TestFailedAddLeavesNothing(t *testing.T) {
	n := newTestNode(t)
	list := Conflist{CNIVersion: "1.1.0", Name: "lab", Plugins: []Plugin{
		n.Bridge("br0", "10.62.0.0/30"),
		{"type": "tuning", "sysctl": Plugin{"net.no.such": "1"}},
	}}
	_, _, err := n.AddPod(t.Context(), list, PodSpec{})
	if err == nil || !strings.Contains(err.Error(), "tuning") {
		t.Fatalf("ADD: %v, want an error of tuning", err)
	}
	// The subnet has one address for pods: the failed pod must have given it back.
	pod, _, err := n.AddPod(t.Context(), Conflist{CNIVersion: "1.1.0", Name: "lab", Plugins: list.Plugins[:1]}, PodSpec{})
	if err != nil {
		t.Fatalf("address still taken after a failed ADD: %v", err)
	}
	if err := n.DelPod(t.Context(), pod); err != nil {
		t.Error(err)
	}
}

func TestLabelsReachThePlugins(t *testing.T) {
	list := Conflist{Plugins: []Plugin{{"type": "x"}}}
	b, err := list.withLabels(map[string]string{"b": "2", "a": "1"}).JSON()
	if err != nil {
		t.Fatal(err)
	}
	want := `"args":{"cni":{"labels":[{"key":"a","value":"1"},{"key":"b","value":"2"}]}}`
	if !strings.Contains(string(b), want) {
		t.Errorf("conflist %s lacks %s", b, want)
	}
	if _, ok := list.Plugins[0]["args"]; ok {
		t.Error("the caller's list was changed")
	}
}
