// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package runtime

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podgate/podgate/test/netlab"
)

// manifests are what a kubelet would know of the pods below, and a policy.
const manifests = `
apiVersion: v1
kind: Pod
metadata: { namespace: default, name: server, uid: uid-server, labels: { app: server } }
---
apiVersion: v1
kind: Pod
metadata: { namespace: default, name: client, uid: uid-client, labels: { app: client } }
---
apiVersion: v1
kind: Pod
metadata: { namespace: default, name: stranger, uid: uid-stranger, labels: { app: stranger } }
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: { namespace: default, name: server-serves-client }
spec:
  podSelector: { matchLabels: { app: server } }
  ingress:
  - from: [{ podSelector: { matchLabels: { app: client } } }]
    ports: [{ port: 8080 }]
`

// TestContainerd runs pods under policy without a daemon: what podgate sync
// published once is what ADD finds.
func TestContainerd(t *testing.T) { eachContainerd(t, testContainerd) }

func testContainerd(t *testing.T, programs string) {
	bin := build(t)
	node := newNode(t, bin)
	podgate := func(args ...string) []byte {
		t.Helper()
		args = append(args, "--bpffs", node.BPFFS, "--run-dir", filepath.Join(node.Dir, "run"))
		out, err := node.Exec(t.Context(), filepath.Join(bin, "podgate"), args...)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	policy := filepath.Join(node.Dir, "policy")
	if err := os.Mkdir(policy, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(policy, "all.yaml"), []byte(manifests), 0o600); err != nil {
		t.Fatal(err)
	}
	podgate("sync", "--policy-dir", policy, "--once")

	c := run(t, programs, node, node.Podgate())
	pods := map[string]*pod{}
	for _, name := range []string{"server", "client", "stranger"} {
		var err error
		if pods[name], err = c.runPod(t.Context(), "default", name, "uid-"+name); err != nil {
			t.Fatal(err)
		}
	}
	if got, want := endpoints(t, podgate), []string{
		"default/client uid-client open",
		"default/server uid-server enforcing",
		"default/stranger uid-stranger open",
	}; !slices.Equal(got, want) {
		t.Errorf("endpoints %q, want %q", got, want)
	}
	for name, want := range map[string]bool{"client": true, "stranger": false} {
		if got := dials(t, c, pods[name], pods["server"]); got != want {
			t.Errorf("%s reaches server: %t, want %t", name, got, want)
		}
	}
	// Nothing isolates the others: what blocks stranger is the policy.
	if !dials(t, c, pods["client"], pods["stranger"]) {
		t.Error("client does not reach stranger, which no policy selects")
	}
	if err := c.removePods(t.Context()); err != nil {
		t.Fatal(err)
	}
	if left := endpoints(t, podgate); len(left) > 0 {
		t.Errorf("endpoints after all pods were removed: %q", left)
	}
}

// TestImage runs podgate's own image, from the file that is made to be
// imported.
func TestImage(t *testing.T) {
	const image, version = "podgate.test/podgate:1", "v0.0.0-test"
	bin := t.TempDir()
	out, err := exec.CommandContext(t.Context(), "make", "-C", "../..", "image",
		"BIN="+bin, "IMAGE="+image, "VERSION="+version).CombinedOutput()
	if err != nil {
		t.Fatalf("make image: %v\n%s", err, out)
	}
	plugins := build(t)
	eachContainerd(t, func(t *testing.T, programs string) {
		c := run(t, programs, newNode(t, plugins))
		if err := c.load(t.Context(), filepath.Join(bin, "image.tar")); err != nil {
			t.Fatal(err)
		}
		p, err := c.runPod(t.Context(), "default", "podgate", "uid-podgate")
		if err != nil {
			t.Fatal(err)
		}
		id, err := c.start(t.Context(), p, &cri.ContainerConfig{
			Metadata: &cri.ContainerMetadata{Name: "podgate"},
			Image:    &cri.ImageSpec{Image: image},
			Args:     []string{"version"},
			LogPath:  "podgate",
		})
		if err != nil {
			t.Fatal(err)
		}
		for state := cri.ContainerState_CONTAINER_CREATED; state != cri.ContainerState_CONTAINER_EXITED; {
			reply, err := c.ContainerStatus(t.Context(), &cri.ContainerStatusRequest{ContainerId: id})
			if err != nil {
				t.Fatal(err)
			}
			state = reply.GetStatus().GetState()
			time.Sleep(10 * time.Millisecond)
		}
		log, err := os.ReadFile(filepath.Join(c.logs(), "podgate"))
		if err != nil || !bytes.Contains(log, []byte("podgate "+version+",")) {
			t.Errorf("`podgate version` prints %s (%v)", log, err)
		}
	})
}

// newNode makes a node that ends with the test.
func newNode(t *testing.T, plugins string) *netlab.Node {
	t.Helper()
	node, err := netlab.New(netlab.Options{Plugins: plugins})
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

// build fills a directory with the CNI plugins and podgate.
func build(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	here, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	t.Chdir("../..") // the module of what is built
	if err := netlab.Build(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	out, err := exec.CommandContext(t.Context(), "go", "build", "-o", dir, "./cmd/podgate").CombinedOutput()
	if err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	t.Chdir(here)
	return dir
}

// run starts containerd with bridge, and what comes after it, as its network.
// cniVersion is the highest that Debian 12's containerd speaks.
func run(t *testing.T, programs string, node *netlab.Node, after ...netlab.Plugin) *containerd {
	t.Helper()
	c, err := startContainerd(t.Context(), programs, node, netlab.Conflist{
		CNIVersion: "1.0.0",
		Name:       "lab",
		Plugins:    append([]netlab.Plugin{node.Bridge("cni0", "10.88.0.0/24", "fd88::/64")}, after...),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			log, _ := os.ReadFile(c.log)
			t.Logf("containerd:\n%s", log)
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

// endpoints are podgate's, as "namespace/name uid state".
func endpoints(t *testing.T, podgate func(args ...string) []byte) []string {
	t.Helper()
	var status struct {
		Endpoints []struct{ Name, PodUID, State string }
	}
	if err := json.Unmarshal(podgate("status", "-o", "json"), &status); err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range status.Endpoints {
		names = append(names, fmt.Sprintf("%s %s %s", e.Name, e.PodUID, e.State))
	}
	slices.Sort(names)
	return names
}

// dials connects from a container of one pod to another pod. The answers of
// interest are yes and a time-out: a refusal is neither.
func dials(t *testing.T, c *containerd, from, to *pod) bool {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	id, err := c.container(ctx, from)
	if err != nil {
		t.Fatal(err)
	}
	reply, err := c.ExecSync(ctx, &cri.ExecSyncRequest{
		ContainerId: id,
		Cmd:         []string{"/pod", "dial", net.JoinHostPort(to.address, "8080")},
	})
	if err != nil {
		t.Fatal(err)
	}
	switch reply.GetExitCode() {
	case 0:
		return true
	case exitTimeout:
		return false
	}
	t.Fatalf("dial: exit code %d: %s", reply.GetExitCode(), reply.GetStderr())
	return false
}
