// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package runtime

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

// TestInstall puts podgate under a containerd that runs, gates the pod that it
// runs by then, and takes podgate off again.
func TestInstall(t *testing.T) { eachContainerd(t, testInstall) }

func testInstall(t *testing.T, programs string) {
	bin := build(t)
	node := newNode(t, bin)
	// What is to be installed is not there yet.
	source, policy := filepath.Join(node.Dir, "source"), filepath.Join(node.Dir, "policy")
	for _, err := range []error{
		os.Mkdir(source, 0o700), os.Mkdir(policy, 0o700),
		os.Rename(filepath.Join(bin, "podgate-cni"), filepath.Join(source, "podgate-cni")),
		os.Rename(filepath.Join(bin, "podgate"), filepath.Join(source, "podgate")),
		os.Remove(filepath.Join(bin, "podgate-ipam")),
		os.WriteFile(filepath.Join(policy, "all.yaml"), []byte(manifests), 0o600),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	c := run(t, programs, node)
	// The network namespaces of pods are files in containerd's mount namespace.
	mounts := fmt.Sprintf("--mount=/proc/%d/ns/mnt", c.process.Process.Pid)
	podgate := func(args ...string) []byte {
		t.Helper()
		args = append([]string{mounts, filepath.Join(source, "podgate")}, args...)
		args = append(args, "--bpffs", node.BPFFS, "--run-dir", filepath.Join(node.Dir, "run"))
		out, err := node.Exec(t.Context(), "nsenter", args...)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	flags := []string{
		"--conf-dir", c.networks(), "--bin-dir", bin, "--systemd", "off",
		"--command-dir", filepath.Join(node.Dir, "command"), "--state-dir", filepath.Join(node.Dir, "state"),
	}
	conflist := filepath.Join(c.networks(), "10-lab.conflist")
	before, err := os.ReadFile(conflist)
	if err != nil {
		t.Fatal(err)
	}

	pods := map[string]*pod{}
	start := func(name string) {
		t.Helper()
		var err error
		if pods[name], err = c.runPod(t.Context(), "default", name, "uid-"+name); err != nil {
			t.Fatal(err)
		}
	}
	start("server")
	podgate(append([]string{"install"}, flags...)...)
	podgate("sync", "--policy-dir", policy, "--once")
	// containerd reads its network again when it hears of the change.
	for i := 0; len(endpoints(t, podgate)) == 0; i++ {
		if i == 50 {
			t.Fatal("containerd does not call podgate-cni")
		}
		time.Sleep(100 * time.Millisecond)
		start(fmt.Sprintf("probe-%d", i))
	}
	start("client")
	start("stranger")
	podgate("adopt", "--conf-dir", c.networks(), "--bin-dir", bin)
	if got := endpoints(t, podgate); !slices.Contains(got, "default/server uid-server enforcing") {
		t.Errorf("server is not among the endpoints %q", got)
	}
	for name, want := range map[string]bool{"client": true, "stranger": false} {
		if got := dials(t, c, pods[name], pods["server"]); got != want {
			t.Errorf("%s reaches server: %t, want %t", name, got, want)
		}
	}

	podgate(append([]string{"uninstall"}, flags...)...)
	if after, err := os.ReadFile(conflist); err != nil || !bytes.Equal(after, before) {
		t.Errorf("the list is\n%s (%v), before it was\n%s", after, err, before)
	}
	if !dials(t, c, pods["stranger"], pods["server"]) {
		t.Error("stranger does not reach server without podgate")
	}
	kept, err := filepath.Glob(filepath.Join(c.cache(), "results", "*"))
	if err != nil || len(kept) < 3 {
		t.Errorf("containerd keeps %v (%v)", kept, err)
	}
	for _, path := range kept {
		b, err := os.ReadFile(path)
		if err != nil || bytes.Contains(b, []byte("podgate")) {
			t.Errorf("%s: %s (%v)", path, b, err)
		}
	}
	if err := c.removePods(t.Context()); err != nil {
		t.Errorf("DEL without podgate: %v", err)
	}
}
