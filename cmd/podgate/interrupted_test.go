// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"

	"github.com/podgate/podgate/test/netlab"
	"github.com/podgate/podgate/test/tracer"
)

// installer is a runtime whose network podgate comes into and leaves, as
// processes of its own that may be stopped anywhere.
type installer struct {
	*runtime
	install, uninstall []string
	// The node before podgate, and with it, and the network's configuration.
	before, installed map[string]string
	without, with     []byte
}

func newInstaller(t *testing.T) *installer {
	t.Helper()
	t.Parallel() // They wait for the kernel most of the time.
	r := newRuntime(t)
	i := &installer{
		runtime:   r,
		install:   append([]string{"install", "--from", filepath.Join(r.node.Dir, "source")}, r.flags...),
		uninstall: append([]string{"uninstall", "--cni-cache-dir", filepath.Join(r.node.Dir, "cni-cache"), "--settle", "0s"}, r.flags...),
	}
	// libcni makes its cache with the first container.
	p, _ := i.pod("first")
	must(t, i.node.DelPod(t.Context(), p))
	i.without, i.before = i.configured(), i.tree()
	i.ok(0, i.install...)
	i.with, i.installed = i.configured(), i.tree()
	i.ok(0, i.uninstall...)
	i.isLike(i.before, "installed and uninstalled")
	return i
}

// configured is the network's configuration.
func (i *installer) configured() []byte {
	i.t.Helper()
	b, err := os.ReadFile(i.conf)
	must(i.t, err)
	return b
}

// tree is all there is on the node: modes and digests by path. Of the log, which
// has times, and of the last addresses that were given it is only that they are
// there.
func (i *installer) tree() map[string]string {
	i.t.Helper()
	all := map[string]string{}
	for _, root := range []string{i.node.Dir, i.node.Plugins, i.node.BPFFS + "/."} {
		must(i.t, filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			info, err := os.Lstat(path)
			if err != nil {
				return err
			}
			all[path] = info.Mode().String()
			if name := filepath.Base(path); name == "install.jsonl" || strings.HasPrefix(name, "last_reserved_ip.") {
				return nil
			}
			if info.Mode().IsRegular() && root != i.node.BPFFS+"/." {
				b, err := os.ReadFile(path)
				if err != nil {
					return err
				}
				sum := sha256.Sum256(b)
				all[path] += " " + hex.EncodeToString(sum[:])
			}
			return nil
		}))
	}
	return all
}

// isLike compares the node with a tree.
func (i *installer) isLike(want map[string]string, when string) {
	i.t.Helper()
	got := i.tree()
	for _, path := range slices.Sorted(maps.Keys(got)) {
		if want[path] != got[path] {
			i.t.Errorf("%s: %s is %s, want %q", when, path, got[path], want[path])
		}
	}
	for _, path := range slices.Sorted(maps.Keys(want)) {
		if _, ok := got[path]; !ok {
			i.t.Errorf("%s: %s is gone", when, path)
		}
	}
	if i.t.Failed() {
		i.t.FailNow()
	}
}

// trace runs podgate until its nth change, at which it is killed, and lists the
// changes that it was about to make.
func (i *installer) trace(n int, args ...string) (calls []tracer.Call) {
	i.t.Helper()
	var out bytes.Buffer
	err := i.traced(&out, func(c tracer.Call) bool {
		calls = append(calls, c)
		return len(calls) <= n
	}, args...)
	var exit *exec.ExitError
	switch {
	case len(calls) > n && errors.As(err, &exit) && !exit.Exited():
	case len(calls) <= n && err == nil:
	default:
		i.t.Fatalf("podgate %v, after %d changes: %v\n%s", args, len(calls), err, &out)
	}
	return calls
}

func (i *installer) traced(out *bytes.Buffer, before func(tracer.Call) bool, args ...string) error {
	i.t.Helper()
	ctx, cancel := context.WithTimeout(i.t.Context(), time.Minute)
	defer cancel()
	cmd := i.command(ctx, args...)
	cmd.Stdout, cmd.Stderr = out, out
	return i.node.Do(func() error { return tracer.Run(cmd, before) })
}

// worthwhile are the numbers of the changes to die before: of several alike, as
// of a map after the other that is pinned, the first and the last.
func worthwhile(calls []tracer.Call) (all []int) {
	kind := func(n int) string {
		if n < 0 || n == len(calls) {
			return ""
		}
		return calls[n].Name + " " + filepath.Dir(calls[n].Path)
	}
	for n := range calls {
		if kind(n-1) != kind(n) || kind(n) != kind(n+1) {
			all = append(all, n)
		}
	}
	return all
}

// works: the configuration is the one or the other, and a container starts and
// ends with it.
func (i *installer) works(when string) {
	i.t.Helper()
	if b := i.configured(); !bytes.Equal(b, i.without) && !bytes.Equal(b, i.with) {
		i.t.Fatalf("%s: the network is\n%s", when, b)
	}
	p, _, err := i.node.AddPod(i.t.Context(), i.network(), netlab.PodSpec{Namespace: "default", Name: "p", UID: "p"})
	if err == nil {
		err = i.node.DelPod(i.t.Context(), p)
	}
	if err != nil {
		i.t.Fatalf("%s: %v", when, err)
	}
}

// A process that is killed before any of its changes leaves a node on which
// containers start, and which the next process completes or clears: nothing
// of it is left, not even a file or a pin under another name.
func TestInstallKilled(t *testing.T) {
	i := newInstaller(t)
	const all = 10_000
	calls := i.trace(all, i.install...)
	i.ok(0, i.uninstall...)
	if len(calls) < 40 {
		t.Fatalf("only %d changes: %v", len(calls), calls)
	}
	for round, n := range worthwhile(calls) {
		killed := i.trace(n, i.install...)
		when := "install killed before " + killed[len(killed)-1].String()
		i.works(when)
		i.ok(0, i.uninstall...)
		i.isLike(i.before, when+", uninstalled")
		if round%2 == 0 {
			i.trace(n, i.install...)
			i.ok(0, i.install...)
			i.isLike(i.installed, when+", completed")
			i.ok(0, i.uninstall...)
			i.isLike(i.before, when+", completed and uninstalled")
		}
	}
}

// The same for uninstall. A container of under podgate ends with what the runtime
// has kept of its start.
func TestUninstallKilled(t *testing.T) {
	i := newInstaller(t)
	const all = 10_000
	gated := func(n int) (*netlab.Pod, []tracer.Call) {
		i.ok(0, i.install...)
		p, _ := i.pod("gated")
		return p, i.trace(n, i.uninstall...)
	}
	p, calls := gated(all)
	must(t, i.delAsKept(filepath.Join(i.node.Dir, "cni-cache"), p))
	if len(calls) < 20 {
		t.Fatalf("only %d changes: %v", len(calls), calls)
	}
	for round, n := range worthwhile(calls) {
		p, killed := gated(n)
		when := "uninstall killed before " + killed[len(killed)-1].String()
		i.works(when)
		if round%2 == 0 { // Somebody has changed his mind.
			i.ok(0, i.install...)
		}
		i.ok(0, i.uninstall...)
		must(t, i.delAsKept(filepath.Join(i.node.Dir, "cni-cache"), p))
		i.isLike(i.before, when+", completed")
	}
}

// The second installer waits for the first, and no longer than it is told to;
// who was killed holds nothing.
func TestInstallersWait(t *testing.T) {
	i := newInstaller(t)
	var out bytes.Buffer
	held := false
	err := i.traced(&out, func(c tracer.Call) bool {
		if c.Name != "renameat" || c.Path != i.conf {
			return true
		}
		held = true
		for _, args := range [][]string{i.install, i.uninstall} {
			code, _, stderr := i.run(append(args, "--timeout", "100ms")...)
			if code != 1 || !strings.Contains(stderr, "another installer is at work") {
				t.Errorf("beside an installer, podgate %s: exit code %d, %s", args[0], code, stderr)
			}
		}
		return false
	}, i.install...)
	if !held {
		t.Fatalf("install does not rename to %s: %v\n%s", i.conf, err, &out)
	}
	i.works("killed")
	i.ok(0, i.install...)
	i.isLike(i.installed, "installed by the next")
}

// Processes that install and uninstall at once: whoever reads the network's
// configuration meanwhile gets one or the other, as a whole.
func TestInstallersAtOnce(t *testing.T) {
	i := newInstaller(t)
	var stop atomic.Bool
	reads := make(chan int)
	go func() {
		n := 0
		defer func() { reads <- n }()
		for ; !stop.Load(); n++ {
			b, err := os.ReadFile(i.conf)
			if err != nil || !bytes.Equal(b, i.without) && !bytes.Equal(b, i.with) {
				t.Errorf("a reader gets %q (%v)", b, err)
				return
			}
			if _, err := libcni.NetworkConfFromBytes(b); err != nil {
				t.Errorf("a runtime reads: %v", err)
			}
			time.Sleep(100 * time.Microsecond)
		}
	}()
	both := func(calls ...[]string) {
		t.Helper()
		done := make([]*daemon, 0, len(calls))
		for _, args := range calls {
			done = append(done, i.background(args...))
		}
		for _, d := range done {
			if err := d.cmd.Wait(); err != nil {
				t.Fatalf("%v: %v\n%s", d.cmd.Args, err, d.logged())
			}
		}
	}
	for round := range 25 {
		both(i.install, i.install)
		if round == 0 {
			i.isLike(i.installed, "installed twice at once")
		} else if b := i.configured(); !bytes.Equal(b, i.with) {
			t.Fatalf("installed twice at once, the network is\n%s", b)
		}
		if round%2 == 0 {
			both(i.uninstall, i.install)
		} else {
			both(i.install, i.uninstall)
		}
	}
	both(i.uninstall, i.uninstall)
	i.isLike(i.before, "uninstalled twice at once")
	stop.Store(true)
	if n := <-reads; n < 100 {
		t.Errorf("only %d reads", n)
	}
}
