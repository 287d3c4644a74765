// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package runtime

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/podgate/podgate/test/need"
	"github.com/podgate/podgate/test/netlab"
)

// podman is a podman 4 with CNI that shares nothing with the machine's own.
type podman struct {
	node *netlab.Node
	dir  string
	// holder keeps a mount namespace, where libcni's cache is podman's own and
	// the network namespaces of containers are mounted.
	holder *exec.Cmd
}

func startPodman(t *testing.T, node *netlab.Node, list netlab.Conflist) *podman {
	t.Helper()
	p := &podman{node: node, dir: filepath.Join(node.Dir, "podman")}
	conflist, err := list.JSON()
	if err != nil {
		t.Fatal(err)
	}
	// Limits stay as they are: raising them needs CAP_SYS_RESOURCE, which not
	// every machine grants its root.
	config := fmt.Sprintf(`
[containers]
default_ulimits = []
[network]
network_backend = "cni"
cni_plugin_dirs = [%q]
network_config_dir = %q
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "runc"
`, node.Plugins, p.networks())
	for _, err := range []error{
		os.MkdirAll(p.networks(), 0o700),
		os.MkdirAll(p.cache(), 0o700),
		os.WriteFile(filepath.Join(p.networks(), "10-lab.conflist"), conflist, 0o600),
		os.WriteFile(p.config(), []byte(config), 0o600),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	p.holder = exec.Command("sh", "-c", `mkdir -p /var/lib/cni && mount --bind "$1" /var/lib/cni && echo && exec cat`, "sh", p.cache())
	p.holder.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	stdin, err := p.holder.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := p.holder.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.holder.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(stdin.Close(), p.holder.Wait()); err != nil {
			t.Error(err)
		}
	})
	if _, err := stdout.Read(make([]byte, 1)); err != nil {
		t.Fatalf("mount %s: %v", p.cache(), err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if out, err := p.run(ctx, "rm", "--all", "--force", "--time", "0"); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
	})
	return p
}

func (p *podman) networks() string { return filepath.Join(p.dir, "net.d") }
func (p *podman) cache() string    { return filepath.Join(p.dir, "cni") }
func (p *podman) config() string   { return filepath.Join(p.dir, "containers.conf") }

// mounts is the flag of nsenter(1) for podman's mount namespace.
func (p *podman) mounts() string { return fmt.Sprintf("--mount=/proc/%d/ns/mnt", p.holder.Process.Pid) }

// run runs podman and returns all that it prints.
func (p *podman) run(ctx context.Context, args ...string) (string, error) {
	args = append([]string{
		p.mounts(), "podman", "--root", filepath.Join(p.dir, "root"), "--runroot", filepath.Join(p.dir, "run"),
		"--tmpdir", filepath.Join(p.dir, "tmp"), "--storage-driver", "vfs",
	}, args...)
	cmd := exec.CommandContext(ctx, "nsenter", args...)
	cmd.Env = append(os.Environ(), "CONTAINERS_CONF="+p.config())
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := p.node.Do(cmd.Start); err != nil {
		return "", err
	}
	if err := cmd.Wait(); err != nil {
		return out.String(), fmt.Errorf("podman: %w", err)
	}
	return strings.TrimSpace(out.String()), nil
}

// TestPodman installs podgate under podman, which calls DEL with the
// configuration that it kept of ADD.
func TestPodman(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("containers need root")
	}
	need.Tools(t, "podman", "conmon", "runc", "nsenter")
	bin := build(t)
	source, policy := filepath.Join(t.TempDir(), "source"), t.TempDir()
	node := newNode(t, bin)
	for _, err := range []error{
		os.Mkdir(source, 0o700),
		os.Rename(filepath.Join(bin, "podgate-cni"), filepath.Join(source, "podgate-cni")),
		os.Rename(filepath.Join(bin, "podgate"), filepath.Join(source, "podgate")),
		os.Remove(filepath.Join(bin, "podgate-ipam")),
		os.WriteFile(filepath.Join(policy, "all.yaml"), []byte(manifests), 0o600),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	p := startPodman(t, node, netlab.Conflist{
		CNIVersion: "1.0.0",
		Name:       "lab",
		Plugins:    []netlab.Plugin{node.Bridge("cni0", "10.88.0.0/24")},
	})
	do := func(args ...string) string {
		t.Helper()
		out, err := p.run(t.Context(), args...)
		if err != nil {
			t.Fatalf("%q: %v\n%s", args, err, out)
		}
		return out
	}
	podgate := func(args ...string) []byte {
		t.Helper()
		args = append([]string{p.mounts(), filepath.Join(source, "podgate")}, args...)
		args = append(args, "--bpffs", node.BPFFS, "--run-dir", filepath.Join(node.Dir, "run"))
		out, err := node.Exec(t.Context(), "nsenter", args...)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	image := filepath.Join(p.dir, "image.tar")
	if err := writeImage(t.Context(), image); err != nil {
		t.Fatal(err)
	}
	do("load", "--input", image)
	start := func(name string) {
		t.Helper()
		do("run", "--detach", "--name", name, "--network", "lab", imageName)
	}
	conflist := filepath.Join(p.networks(), "10-lab.conflist")
	before, err := os.ReadFile(conflist)
	if err != nil {
		t.Fatal(err)
	}
	flags := []string{
		"--conf-dir", p.networks(), "--bin-dir", bin, "--systemd", "off",
		"--command-dir", filepath.Join(node.Dir, "command"), "--state-dir", filepath.Join(node.Dir, "state"),
	}

	start("server")
	podgate(append([]string{"install"}, flags...)...)
	podgate("sync", "--policy-dir", policy, "--once")
	start("client")
	start("stranger")
	podgate("adopt", "--conf-dir", p.networks(), "--bin-dir", bin)
	podgate("sync", "--policy-dir", policy, "--once")
	// podman says what a container is called, and knows no UID.
	if got := endpoints(t, podgate); !slices.Contains(got, "default/server  enforcing") {
		t.Errorf("server is not among the endpoints %q", got)
	}
	address := do("inspect", "--format", `{{(index .NetworkSettings.Networks "lab").IPAddress}}`, "server") + ":8080"
	dials := func(from string) bool {
		t.Helper()
		out, err := p.run(t.Context(), "exec", from, "/pod", "dial", address)
		var exit *exec.ExitError
		switch {
		case err == nil:
			return true
		case errors.As(err, &exit) && exit.ExitCode() == exitTimeout:
			return false
		}
		t.Fatalf("dial: %v\n%s", err, out)
		return false
	}
	for name, want := range map[string]bool{"client": true, "stranger": false} {
		if got := dials(name); got != want {
			t.Errorf("%s reaches server: %t, want %t", name, got, want)
		}
	}

	podgate(append([]string{"uninstall"}, flags...)...)
	if after, err := os.ReadFile(conflist); err != nil || !bytes.Equal(after, before) {
		t.Errorf("the list is\n%s (%v), before it was\n%s", after, err, before)
	}
	if !dials("stranger") {
		t.Error("stranger does not reach server without podgate")
	}
	// A DEL that fails is no failure of podman's, but a line that it prints.
	if out := do("rm", "--force", "--time", "0", "client"); strings.Contains(out, "podgate") || strings.Contains(out, "level=error") {
		t.Errorf("rm of a container that was started under podgate: %s", out)
	}
	kept, err := filepath.Glob(filepath.Join(p.cache(), "results", "*"))
	if err != nil || len(kept) != 2 {
		t.Errorf("podman keeps %v (%v)", kept, err)
	}
	for _, path := range kept {
		b, err := os.ReadFile(path)
		if err != nil || bytes.Contains(b, []byte("podgate")) {
			t.Errorf("%s: %s (%v)", path, b, err)
		}
	}
}
