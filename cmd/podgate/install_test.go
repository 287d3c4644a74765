// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	"golang.org/x/sys/unix"

	"github.com/podgate/podgate/install"
	"github.com/podgate/podgate/test/need"
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

// conversation is an open connection between two pods.
type conversation struct{ opener, other net.Conn }

func (r *runtime) conversation(from, to *netlab.Pod, address string) conversation {
	r.t.Helper()
	var listener net.Listener
	must(r.t, to.Do(func() (err error) {
		listener, err = net.Listen("tcp", net.JoinHostPort(address, "0"))
		return err
	}))
	var c conversation
	must(r.t, from.Do(func() (err error) {
		c.opener, err = net.DialTimeout("tcp", listener.Addr().String(), 5*time.Second)
		return err
	}))
	var err error
	c.other, err = listener.Accept()
	must(r.t, err)
	r.t.Cleanup(func() { c.opener.Close(); c.other.Close(); listener.Close() })
	return c
}

// say sends a line each way; the first speaker need not be who opened.
func (c conversation) say(first, second net.Conn) error {
	for _, way := range [][2]net.Conn{{first, second}, {second, first}} {
		deadline := time.Now().Add(2 * time.Second)
		if err := errors.Join(way[0].SetDeadline(deadline), way[1].SetDeadline(deadline)); err != nil {
			return err
		}
		if _, err := fmt.Fprintln(way[0], "hello"); err != nil {
			return err
		}
		line := make([]byte, len("hello\n"))
		if _, err := io.ReadFull(way[1], line); err != nil {
			return err
		}
	}
	return nil
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
	open := r.conversation(client, server, address)
	must(t, open.say(open.opener, open.other))
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
	must(t, open.say(open.other, open.opener))
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

// Pods of before podgate are gated as they run. Of their connections those go on
// that policy allows, whoever speaks first.
func TestAdopt(t *testing.T) {
	r := newRuntime(t)
	server, address := r.pod("server")
	friend, _ := r.pod("friend")
	stranger, _ := r.pod("stranger")
	friendly, strange := r.conversation(friend, server, address), r.conversation(stranger, server, address)

	r.ok(0, append([]string{"install", "--from", filepath.Join(r.node.Dir, "source")}, r.flags...)...)
	for _, name := range []string{"server", "friend", "stranger"} {
		r.write(name+".yaml", fmt.Sprintf(`{"apiVersion": "v1", "kind": "Pod", "metadata":
			{"name": %q, "namespace": "default", "uid": %q, "labels": {"app": %q}}, "spec": {"nodeName": "n1"}}`, name, name, name))
	}
	// The server may be spoken to by its friend, and may not speak to anybody.
	r.write("policy.yaml", `{"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "p", "namespace": "default"},
		"spec": {"podSelector": {"matchLabels": {"app": "server"}}, "policyTypes": ["Ingress", "Egress"],
			"ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "friend"}}}]}]}}`)
	daemon := r.sync()
	r.until("applied", func() bool { return strings.Contains(daemon.logged(), "applied") })

	args := []string{
		"adopt", "--conf-dir", filepath.Dir(r.conf), "--bin-dir", r.node.Plugins, "--cni-cache-dir", filepath.Join(r.node.Dir, "cni-cache"),
	}
	var dry, adopted []install.Adopted
	r.json(0, &dry, append(args, "--dry-run")...)
	if len(dry) != 3 || len(r.status().Endpoints) != 0 {
		t.Errorf("dry run says %v", dry)
	}
	r.json(0, &adopted, args...)
	connections := map[string]int{}
	for _, a := range adopted {
		connections[a.Pod] = a.Connections
	}
	if want := map[string]int{"default/server": 2, "default/friend": 1, "default/stranger": 1}; !maps.Equal(connections, want) {
		t.Errorf("adopted are %v, want %v", adopted, want)
	}
	if got := states(r.status()); got["default/server"] != "enforcing" || got["default/friend"] != "open" {
		t.Errorf("endpoints are %v", got)
	}
	must(t, friendly.say(friendly.other, friendly.opener))
	if err := strange.say(strange.other, strange.opener); err == nil {
		t.Error("the stranger's connection goes on")
	}
	if out := r.ok(0, args...); !strings.Contains(out, "no container is without a gate") {
		t.Errorf("adopted again:\n%s", out)
	}
}

// What ended without a DEL is passed over, and what cannot be gated is named.
func TestAdoptWhatCannotBe(t *testing.T) {
	need.Tools(t, "ip")
	r := newRuntime(t)
	ended, _ := r.pod("ended")
	broken, _ := r.pod("broken")
	cached := filepath.Join(r.node.Dir, "cni-cache", "results", "pods-"+ended.ID+"-eth0")
	b, err := os.ReadFile(cached)
	must(t, err)
	must(t, os.WriteFile(cached, []byte(strings.ReplaceAll(string(b), ended.NetNS(), "/run/netns/gone")), 0o600))
	if _, err := broken.Exec(t.Context(), "ip", "link", "del", "eth0"); err != nil {
		t.Fatal(err)
	}
	r.ok(0, append([]string{"install", "--from", filepath.Join(r.node.Dir, "source")}, r.flags...)...)
	var adopted []install.Adopted
	r.json(2, &adopted, "adopt", "--conf-dir", filepath.Dir(r.conf), "--bin-dir", r.node.Plugins,
		"--cni-cache-dir", filepath.Join(r.node.Dir, "cni-cache"))
	if len(adopted) != 1 || adopted[0].Pod != "default/broken" || !strings.Contains(adopted[0].Error, "no such interface in the pod: eth0") {
		t.Errorf("adopted are %+v", adopted)
	}
}

// Whoever writes the network anew gets podgate back into it, and what was
// started meanwhile gets its gate.
func TestInstallWatch(t *testing.T) {
	r := newRuntime(t)
	theirs, err := os.ReadFile(r.conf)
	must(t, err)
	must(t, os.Remove(r.conf))
	watcher := r.background(append([]string{"install", "--watch", "--from", filepath.Join(r.node.Dir, "source"),
		"--cni-cache-dir", filepath.Join(r.node.Dir, "cni-cache")}, r.flags...)...)
	r.until("waiting", func() bool { return strings.Contains(watcher.logged(), "waiting for it to change") })
	for _, name := range []string{"first", "second"} {
		must(t, os.WriteFile(r.conf+".tmp", theirs, 0o600))
		unmerged := r.list
		p, _, err := r.node.AddPod(t.Context(), unmerged, netlab.PodSpec{Namespace: "default", Name: name, UID: name})
		must(t, err)
		t.Cleanup(func() { p.Close() })
		must(t, os.Rename(r.conf+".tmp", r.conf))
		r.until(name+" gated", func() bool { return states(r.status())["default/"+name] == "open" })
		if n := len(r.network().Plugins); n != 2 {
			t.Errorf("the list has %d plugins", n)
		}
	}
	watcher.end(t, unix.SIGTERM)
	if log := watcher.logged(); !strings.Contains(log, "podgate had been taken out of the network") {
		t.Errorf("log:\n%s", log)
	}
}
