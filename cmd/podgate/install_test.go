// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	"golang.org/x/sys/unix"

	"github.com/podgate/podgate/test/netlab"
)

// runtime is a node with a network in a file, as a container runtime has it.
type runtime struct {
	*lab
	conf  string
	flags []string
}

func newRuntime(t *testing.T) *runtime {
	t.Helper()
	l := newLab(t)
	r := &runtime{lab: l, conf: filepath.Join(l.node.Dir, "net.d", "10-pods.conflist")}
	source := filepath.Join(l.node.Dir, "source")
	for _, dir := range []string{source, filepath.Dir(r.conf)} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	// The runtime has no plugins of podgate's before they are installed.
	plugin := filepath.Join(l.node.Plugins, "podgate-cni")
	must(t, os.Rename(plugin, filepath.Join(source, "podgate-cni")))
	must(t, os.Remove(filepath.Join(l.node.Plugins, "podgate-ipam")))
	must(t, os.WriteFile(filepath.Join(source, "podgate"), []byte("#!/bin/sh\n"), 0o755))

	l.list.Plugins = l.list.Plugins[:1]
	text, err := l.list.JSON()
	must(t, err)
	must(t, os.WriteFile(r.conf, text, 0o644))
	r.flags = []string{
		"--conf-dir", filepath.Dir(r.conf), "--bin-dir", l.node.Plugins, "--systemd", "off",
		"--command-dir", filepath.Join(l.node.Dir, "command"), "--state-dir", filepath.Join(l.node.Dir, "state"),
	}
	return r
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// network is what is in the file by now.
func (r *runtime) network() netlab.Conflist {
	r.t.Helper()
	b, err := os.ReadFile(r.conf)
	must(r.t, err)
	var list struct {
		CNIVersion string          `json:"cniVersion"`
		Name       string          `json:"name"`
		Plugins    []netlab.Plugin `json:"plugins"`
	}
	must(r.t, json.Unmarshal(b, &list))
	return netlab.Conflist{CNIVersion: list.CNIVersion, Name: list.Name, Plugins: list.Plugins}
}

func (r *runtime) pod(name string) (*netlab.Pod, string) {
	r.t.Helper()
	p, result, err := r.node.AddPod(r.t.Context(), r.network(), netlab.PodSpec{Namespace: "default", Name: name, UID: name})
	must(r.t, err)
	r.t.Cleanup(func() { p.Close() })
	return p, result.IPs[0].Address.IP.String()
}

// conversation is an open connection, whose other side answers each line.
func (r *runtime) conversation(from, to *netlab.Pod, address string) (say func() error) {
	r.t.Helper()
	var listener net.Listener
	must(r.t, to.Do(func() (err error) {
		listener, err = net.Listen("tcp", net.JoinHostPort(address, "0"))
		return err
	}))
	go func() {
		c, err := listener.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		for s := bufio.NewScanner(c); s.Scan(); {
			if _, err := fmt.Fprintln(c, s.Text()); err != nil {
				return
			}
		}
	}()
	var c net.Conn
	must(r.t, from.Do(func() (err error) {
		c, err = net.DialTimeout("tcp", listener.Addr().String(), 5*time.Second)
		return err
	}))
	r.t.Cleanup(func() { c.Close(); listener.Close() })
	answers := bufio.NewScanner(c)
	return func() error {
		if err := c.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
			return err
		}
		if _, err := fmt.Fprintln(c, "hello"); err != nil {
			return err
		}
		if !answers.Scan() || answers.Text() != "hello" {
			return fmt.Errorf("answer %q: %w", answers.Text(), answers.Err())
		}
		return nil
	}
}

// From nothing to gated pods and back, with a connection open all the time.
func TestInstallAndUninstall(t *testing.T) {
	r := newRuntime(t)
	before, err := os.ReadFile(r.conf)
	must(t, err)
	r.ok(0, append([]string{"install", "--from", filepath.Join(r.node.Dir, "source"), "--options", `{"mode":"open"}`}, r.flags...)...)
	installed := r.network()
	if n := len(installed.Plugins); n != 2 || installed.Plugins[1]["type"] != "podgate-cni" || installed.Plugins[1]["bpffs"] != r.node.BPFFS {
		t.Fatalf("the list is %v", installed)
	}

	server, address := r.pod("server")
	client, _ := r.pod("client")
	say := r.conversation(client, server, address)
	must(t, say())
	if got := states(r.status()); got["default/server"] != "open" || got["default/client"] != "open" {
		t.Errorf("endpoints are %v", got)
	}

	cache := filepath.Join(r.node.Dir, "cni-cache")
	out := r.ok(0, append([]string{"uninstall", "--cni-cache-dir", cache, "--settle", "10ms"}, r.flags...)...)
	if list, err := os.ReadFile(r.conf); err != nil || string(list) != string(before) {
		t.Errorf("the list is\n%s (%v), before it was\n%s", list, err, before)
	}
	order := []string{"take podgate-cni out of " + r.conf, "take podgate off every interface", "remove " + filepath.Join(r.node.Plugins, "podgate-cni")}
	for i, at := 0, 0; i < len(order); i++ {
		next := strings.Index(out[at:], order[i])
		if next < 0 {
			t.Errorf("%q does not come next in\n%s", order[i], out)
			break
		}
		at += next
	}
	must(t, say())
	for _, path := range []string{
		filepath.Join(r.node.BPFFS, "podgate"), filepath.Join(r.node.Plugins, "podgate-cni"), filepath.Join(r.node.Dir, "state"), r.runDir,
	} {
		if _, err := os.Lstat(path); !os.IsNotExist(err) {
			t.Errorf("%s: %v", path, err)
		}
	}

	// CRI-O and podman hand DEL what they kept when they called ADD. That list
	// of then would not do any more.
	if err := r.node.Del(t.Context(), installed, client); err == nil {
		t.Error("DEL does without podgate-cni: this test tests nothing")
	}
	must(t, r.delAsKept(cache, server))
	must(t, r.delAsKept(cache, client))
	if kept, err := os.ReadDir(filepath.Join(cache, "results")); err != nil || len(kept) > 0 {
		t.Errorf("the runtime still has %v (%v)", kept, err)
	}
}

// delAsKept calls DEL with the list of libcni's cache.
func (r *runtime) delAsKept(cache string, p *netlab.Pod) error {
	return r.node.Do(func() error {
		cni := libcni.NewCNIConfigWithCacheDir([]string{r.node.Plugins}, cache, nil)
		rt := &libcni.RuntimeConf{ContainerID: p.ID, NetNS: p.NetNS(), IfName: p.IfName}
		config, rt, err := cni.GetNetworkListCachedConfig(&libcni.NetworkConfigList{Name: "pods"}, rt)
		if err != nil {
			return err
		}
		list, err := libcni.NetworkConfFromBytes(config)
		if err != nil {
			return err
		}
		return cni.DelNetworkList(context.Background(), list, rt)
	})
}

// What is dry, refused or done twice changes nothing.
func TestInstallAgain(t *testing.T) {
	r := newRuntime(t)
	before, err := os.ReadFile(r.conf)
	must(t, err)
	args := append([]string{"install", "--from", filepath.Join(r.node.Dir, "source")}, r.flags...)
	if out := r.ok(0, append(args, "--dry-run")...); !strings.Contains(out, "put podgate-cni into "+r.conf) {
		t.Errorf("dry run says\n%s", out)
	}
	if list, err := os.ReadFile(r.conf); err != nil || string(list) != string(before) {
		t.Errorf("after a dry run the list is %s (%v)", list, err)
	}
	r.ok(0, args...)
	if out := r.ok(0, args...); strings.Contains(out, "place") || strings.Contains(out, "put") {
		t.Errorf("installed again:\n%s", out)
	}
	daemon := r.sync()
	r.until("running", func() bool { return strings.Contains(daemon.logged(), "msg=") })
	if code, _, stderr := r.run(append([]string{"uninstall"}, r.flags...)...); code != 1 || !strings.Contains(stderr, "podgate sync is running") {
		t.Errorf("uninstall beside a daemon: exit code %d, %s", code, stderr)
	}
	daemon.end(t, unix.SIGTERM)
	// Somebody needs what is left.
	must(t, os.WriteFile(filepath.Join(filepath.Dir(r.conf), "20-x.conflist"), []byte(`{"name":"x","plugins":[{"type":"podgate-cni"}]}`), 0o644))
	r.ok(2, append([]string{"uninstall", "--settle", "0s"}, r.flags...)...)
	must(t, os.Remove(filepath.Join(filepath.Dir(r.conf), "20-x.conflist")))
	r.ok(0, append([]string{"uninstall", "--settle", "0s"}, r.flags...)...)
	if list, err := os.ReadFile(r.conf); err != nil || string(list) != string(before) {
		t.Errorf("in the end the list is %s (%v)", list, err)
	}
}
