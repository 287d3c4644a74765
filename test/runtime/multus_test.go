// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package runtime

import (
	"bytes"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"github.com/podgate/podgate/test/netlab"
)

// TestMultus installs podgate where multus is the network of the runtime: the
// entry goes into the list that it delegates a pod's first interface to.
func TestMultus(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("network namespaces need root")
	}
	bin := build(t)
	const multus = "gopkg.in/k8snetworkplumbingwg/multus-cni.v4/cmd/multus"
	out, err := exec.CommandContext(t.Context(), "go", "-C", "multus", "build", "-o", filepath.Join(bin, "multus"), multus).CombinedOutput()
	if err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	source, policy := filepath.Join(t.TempDir(), "source"), t.TempDir()
	node := newNode(t, bin)
	networks, cache := filepath.Join(node.Dir, "net.d"), filepath.Join(node.Dir, "cache")
	before, err := json.Marshal(netlab.Plugin{
		"cniVersion": "1.0.0",
		"name":       "all",
		"type":       "multus",
		"binDir":     bin,
		"cniDir":     filepath.Join(cache, "multus"),
		"delegates": []any{map[string]any{
			"cniVersion": "1.0.0",
			"name":       "pods",
			"plugins":    []any{node.Bridge("cni0", "10.88.0.0/24")},
		}},
	})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(networks, "00-multus.conf")
	for _, err := range []error{
		os.Mkdir(source, 0o700),
		os.Mkdir(networks, 0o700),
		os.WriteFile(file, before, 0o600),
		os.Rename(filepath.Join(bin, "podgate-cni"), filepath.Join(source, "podgate-cni")),
		os.Rename(filepath.Join(bin, "podgate"), filepath.Join(source, "podgate")),
		os.Remove(filepath.Join(bin, "podgate-ipam")),
		os.WriteFile(filepath.Join(policy, "all.yaml"), []byte(manifests), 0o600),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	run := func(args ...string) ([]byte, error) {
		args = append(args, "--bpffs", node.BPFFS, "--run-dir", filepath.Join(node.Dir, "run"))
		return node.Exec(t.Context(), filepath.Join(source, "podgate"), args...)
	}
	podgate := func(args ...string) []byte {
		t.Helper()
		out, err := run(args...)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	flags := []string{
		"--conf-dir", networks, "--bin-dir", bin, "--systemd", "off", "--cni-cache-dir", cache,
		"--command-dir", filepath.Join(node.Dir, "command"), "--state-dir", filepath.Join(node.Dir, "state"),
	}
	podgate(append([]string{"install"}, flags...)...)
	podgate("sync", "--policy-dir", policy, "--once")

	// What a runtime would read.
	list := func() netlab.Conflist {
		t.Helper()
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var plugin netlab.Plugin
		if err := json.Unmarshal(b, &plugin); err != nil {
			t.Fatal(err)
		}
		return netlab.Conflist{CNIVersion: "1.0.0", Name: "all", Plugins: []netlab.Plugin{plugin}}
	}
	spec := netlab.PodSpec{Namespace: "default", Name: "server", UID: "uid-server"}
	first, _, err := node.AddPod(t.Context(), list(), spec)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := endpoints(t, podgate), []string{"default/server uid-server enforcing"}; !slices.Equal(got, want) {
		t.Errorf("endpoints %q, want %q", got, want)
	}
	if err := node.DelPod(t.Context(), first); err != nil {
		t.Error(err)
	}
	if got := endpoints(t, podgate); len(got) > 0 {
		t.Errorf("endpoints after DEL: %q", got)
	}

	second, _, err := node.AddPod(t.Context(), list(), spec)
	if err != nil {
		t.Fatal(err)
	}
	// multus keeps what it delegated to, and calls DEL with that: the plugin has
	// to stay until then.
	uninstall := append([]string{"uninstall"}, flags...)
	var exit *exec.ExitError
	if out, err := run(uninstall...); !errors.As(err, &exit) || exit.ExitCode() != 2 {
		t.Errorf("uninstall with a pod of multus: %v\n%s", err, out)
	}
	if after, err := os.ReadFile(file); err != nil || !bytes.Equal(after, before) {
		t.Errorf("the configuration is\n%s (%v), before it was\n%s", after, err, before)
	}
	if err := node.DelPod(t.Context(), second); err != nil {
		t.Errorf("DEL after podgate was uninstalled: %v", err)
	}
	podgate(uninstall...)
	if _, err := os.Stat(filepath.Join(bin, "podgate-cni")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("podgate-cni is still there: %v", err)
	}
}
