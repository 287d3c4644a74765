// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package install

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/podgate/podgate/conf"
	"github.com/podgate/podgate/install/conflist"
	"github.com/podgate/podgate/pinning"
)

func TestInstall(t *testing.T) {
	for name, prepare := range situations() {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			prepare(h)
			before := h.tree()
			h.install()
			if got := h.read("opt/cni/bin/podgate-ipam"); got != "binary podgate-cni" {
				t.Errorf("podgate-ipam is %q", got)
			}
			f, err := conflist.Pick(h.ConfDir)
			if err != nil {
				t.Fatal(err)
			}
			b, err := os.ReadFile(f.Path)
			if err != nil {
				t.Fatal(err)
			}
			if merged, err := f.Merged(b); err != nil || !merged {
				t.Errorf("%s (%v):\n%s", f.Path, err, b)
			}
			if want := []string{"daemon-reload", "restart podgate.service"}; !slices.Equal(h.systemctl, want) {
				t.Errorf("systemctl was called with %q, want %q", h.systemctl, want)
			}
			after := h.tree()
			h.install()
			h.wantTree("installed again", h.tree(), after)

			h.systemctl = nil
			h.running = false
			if left := h.uninstall(); len(left) > 0 {
				t.Errorf("left: %q", left)
			}
			h.wantTree("uninstalled", h.tree(), before)
			if want := []string{"stop podgate.service", "daemon-reload"}; !slices.Equal(h.systemctl, want) {
				t.Errorf("systemctl was called with %q, want %q", h.systemctl, want)
			}
			if left := h.uninstall(); len(left) > 0 {
				t.Errorf("left: %q", left)
			}
			h.wantTree("uninstalled again", h.tree(), before)
		})
	}
}

// killed is what a process that dies at a point panics with.
type killed struct{ where string }

// dieAt runs f, which dies at the nth point. It tells where, or nothing if f
// came to its end.
func (h *host) dieAt(n int, f func(Options) error) (where string) {
	h.t.Helper()
	o := h.Options
	o.fault = func(at string) {
		if n--; n < 0 {
			panic(killed{at})
		}
	}
	defer func() {
		switch r := recover().(type) {
		case nil:
		case killed:
			where = r.where
		default:
			panic(r)
		}
	}()
	if err := f(o); err != nil {
		h.t.Fatal(err)
	}
	return ""
}

// A process that dies anywhere leaves a network that the runtime can load, whose
// plugins are all there; and whoever comes next completes its work, or undoes
// it.
func TestDeath(t *testing.T) {
	for _, name := range []string{"nothing but a network", "a single plugin", "multus, with an attachment of before"} {
		prepare := situations()[name]
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			reference := newHost(t)
			prepare(reference)
			reference.install()
			installed := relative(reference.settled(), reference)
			for n := 0; ; n++ {
				h := newHost(t)
				prepare(h)
				before := h.tree()
				where := h.dieAt(n, func(o Options) error { return Install(t.Context(), o) })
				if where == "" {
					if n < 20 {
						t.Fatalf("install has only %d points", n)
					}
					break
				}
				what := "install died at " + strings.TrimPrefix(where, h.root)
				h.wantUsable(what)
				if n%2 == 0 {
					h.uninstall()
					h.wantTree(what+", undone", h.tree(), before)
					continue
				}
				h.install()
				h.wantTree(what+", completed", relative(h.settled(), h), installed)
				h.uninstall()
				h.wantTree(what+", completed and undone", h.tree(), before)
			}
			for n := 0; ; n++ {
				h := newHost(t)
				prepare(h)
				before := h.tree()
				h.install()
				h.file("var/lib/cni/results/net-since-eth0", attached(h.merged()))
				where := h.dieAt(n, func(o Options) error { _, err := Uninstall(t.Context(), o); return err })
				if where == "" {
					if n < 10 {
						t.Fatalf("uninstall has only %d points", n)
					}
					break
				}
				what := "uninstall died at " + strings.TrimPrefix(where, h.root)
				h.wantUsable(what)
				h.uninstall()
				after := h.tree()
				if got := after["/var/lib/cni/results/net-since-eth0"]; strings.Contains(got, "podgate") {
					t.Errorf("%s: the cache has %s", what, got)
				}
				delete(after, "/var/lib/cni/results/net-since-eth0")
				if before["/var/lib/cni/results"] == "" {
					delete(after, "/var/lib/cni/results")
				}
				h.wantTree(what+", done again", after, before)
			}
		})
	}
}

// relative is a tree with the root taken out of what is written in it.
func relative(tree map[string]string, h *host) map[string]string {
	out := map[string]string{}
	for path, text := range tree {
		out[strings.ReplaceAll(path, url.PathEscape(h.root), "ROOT")] = strings.ReplaceAll(text, h.root, "ROOT")
	}
	return out
}

// merged is the list that a runtime would keep with a container of now.
func (h *host) merged() string {
	h.t.Helper()
	list, err := conflist.Merge([]byte(bridgeList), conflist.Entry{})
	if err != nil {
		h.t.Fatal(err)
	}
	return string(list)
}

// wantUsable: the runtime finds a network, and podgate-cni if that names it.
func (h *host) wantUsable(what string) {
	h.t.Helper()
	f, err := conflist.Pick(h.ConfDir)
	if err != nil || len(f.Skipped) > 0 {
		h.t.Errorf("%s: %v, skipped %v", what, err, f.Skipped)
		return
	}
	b, err := os.ReadFile(f.Path)
	if err != nil {
		h.t.Fatal(err)
	}
	merged, err := f.Merged(b)
	if err != nil {
		h.t.Errorf("%s: %v", what, err)
	}
	if !merged {
		return
	}
	for _, path := range []string{filepath.Join(h.BinDir, "podgate-cni"), filepath.Join(h.BinDir, "podgate-ipam"), h.Pins.Layout.VersionDir()} {
		if _, err := os.Stat(path); err != nil {
			h.t.Errorf("%s: the runtime would call podgate-cni: %v", what, err)
		}
	}
}

func TestUpgrade(t *testing.T) {
	h := newHost(t)
	before := h.tree()
	h.install()
	h.write(filepath.Join(h.Source, "podgate-cni"), "newer binary")
	h.Entry = json.RawMessage(`{"mode":"open"}`)
	h.Version = "v2"
	h.install()
	if got := h.read("opt/cni/bin/podgate-cni"); got != "newer binary" {
		t.Errorf("podgate-cni is %q", got)
	}
	if got := h.read("etc/cni/net.d/10-net.conflist"); !strings.Contains(got, `"mode": "open"`) {
		t.Errorf("the list is %s", got)
	}
	h.uninstall()
	h.wantTree("uninstalled", h.tree(), before)
}

// A version that does not fit what is pinned must not become the plugin: every
// ADD would fail.
func TestUpgradeThatDoesNotFit(t *testing.T) {
	h := newHost(t)
	h.install()
	before := h.tree()
	h.write(filepath.Join(h.Source, "podgate-cni"), "of another ABI")
	h.ensure = func(context.Context, pinning.Options) error { return pinning.ErrABI }
	if err := Install(t.Context(), h.Options); !errors.Is(err, pinning.ErrABI) {
		t.Errorf("got %v, want ErrABI", err)
	}
	h.wantTree("refused", h.tree(), before)
}

// The main plugin's owner writes what it likes; podgate's entry is taken out of
// what is there by then.
func TestUninstallAfterRewrite(t *testing.T) {
	h := newHost(t)
	h.install()
	rewritten := strings.ReplaceAll(bridgeList, `"bridge" }`, `"bridge", "mtu": 1400 }`)
	list, err := conflist.Merge([]byte(rewritten), conflist.Entry{})
	if err != nil {
		t.Fatal(err)
	}
	h.file("etc/cni/net.d/10-net.conflist", string(list))
	h.uninstall()
	if got := h.read("etc/cni/net.d/10-net.conflist"); got != rewritten {
		t.Errorf("the list is %s", got)
	}
}

// What others have changed or still use stays, and is named.
func TestUninstallLeaves(t *testing.T) {
	t.Run("a binary of somebody else", func(t *testing.T) {
		h := newHost(t)
		h.install()
		h.file("usr/local/bin/podgate", "another one")
		left := h.uninstall()
		if len(left) != 1 || !strings.Contains(left[0], "usr/local/bin/podgate stays: somebody has changed it") {
			t.Errorf("left: %q", left)
		}
		if got := h.read("usr/local/bin/podgate"); got != "another one" {
			t.Errorf("podgate is %q", got)
		}
	})
	t.Run("plugins that a network names", func(t *testing.T) {
		h := newHost(t)
		before := h.tree()
		h.install()
		h.file("etc/cni/net.d/20-second.conflist", strings.ReplaceAll(bridgeList, `"bridge"`, `"bridge", "ipam": {"type": "podgate-ipam"}`))
		left := h.uninstall()
		if len(left) != 2 || !strings.Contains(left[0], "20-second.conflist") {
			t.Errorf("left: %q", left)
		}
		h.wantUsable("second network")
		if got := h.read("opt/cni/bin/podgate-ipam"); got != "binary podgate-cni" {
			t.Errorf("podgate-ipam is %q", got)
		}
		if err := os.Remove(filepath.Join(h.ConfDir, "20-second.conflist")); err != nil {
			t.Fatal(err)
		}
		if left := h.uninstall(); len(left) > 0 {
			t.Errorf("left: %q", left)
		}
		h.wantTree("uninstalled", h.tree(), before)
	})
	t.Run("plugins that multus will call", func(t *testing.T) {
		h := newHost(t)
		h.install()
		state, err := json.Marshal([]map[string]any{{"Bytes": []byte(h.merged())}})
		if err != nil {
			t.Fatal(err)
		}
		h.file("var/lib/cni/multus/container", string(state))
		if left := h.uninstall(); len(left) != 2 || !strings.Contains(left[0], "multus/container") {
			t.Errorf("left: %q", left)
		}
	})
	t.Run("manifests", func(t *testing.T) {
		h := newHost(t)
		h.install()
		h.file("etc/podgate/policy.d/mine.yaml", "{}")
		h.uninstall()
		h.read("etc/podgate/policy.d/mine.yaml")
	})
}

// A list that somebody changed after podgate made it is theirs.
func TestUninstallConvertedAndChanged(t *testing.T) {
	h := newHost(t)
	h.file("etc/cni/net.d/05-old.conf", bridgeSingle)
	h.install()
	list := strings.ReplaceAll(h.read("etc/cni/net.d/05-old.conflist"), `"bridge"`, `"ptp"`)
	h.file("etc/cni/net.d/05-old.conflist", list)
	left := h.uninstall()
	if len(left) != 1 || !strings.Contains(left[0], "05-old.conflist was changed") {
		t.Errorf("left: %q", left)
	}
	if got := h.read("etc/cni/net.d/05-old.conflist"); strings.Contains(got, "podgate") || !strings.Contains(got, "ptp") {
		t.Errorf("the list is %s", got)
	}
}

func TestDryRun(t *testing.T) {
	h := newHost(t)
	before := h.tree()
	var steps []string
	h.Step = func(what string) { steps = append(steps, what) }
	h.DryRun = true
	h.install()
	h.wantTree("dry run", h.tree(), before)
	if !slices.ContainsFunc(steps, func(s string) bool { return strings.HasPrefix(s, "put podgate-cni into ") }) {
		t.Errorf("steps are %q", steps)
	}
	h.DryRun = false
	h.install()
	after := h.tree()
	h.DryRun = true
	h.uninstall()
	h.wantTree("dry run", h.tree(), after)
}

// What cannot work fails before anything was done.
func TestInstallRefuses(t *testing.T) {
	for name, test := range map[string]struct {
		prepare func(*host)
		want    error
		says    string
	}{
		"no network": {func(h *host) { h.ConfDir = h.root }, conflist.ErrNone, "no CNI configuration"},
		"a version that is too old": {func(h *host) {
			h.file("etc/cni/net.d/05.conflist", strings.ReplaceAll(bridgeList, "1.0.0", "0.2.0"))
		}, conflist.ErrVersion, "05.conflist"},
		"no binaries":            {func(h *host) { h.Source = h.root }, fs.ErrNotExist, "podgate-cni"},
		"an option that is none": {func(h *host) { h.Entry = json.RawMessage(`{"moed":1}`) }, conf.ErrInvalid, "moed"},
		"another place for pins": {func(h *host) { h.Entry = json.RawMessage(`{"instance":"x"}`) }, conf.ErrInvalid, "instance"},
		"a directory for a file": {func(h *host) { h.file("opt/cni/bin/podgate-cni/x", "") }, ErrInTheWay, "podgate-cni"},
		"an entry made by hand": {func(h *host) {
			h.file("etc/cni/net.d/05.conflist", strings.ReplaceAll(bridgeList, `"bridge" }`, `"bridge" }, { "type": "podgate-cni", "mode": "open" }`))
		}, ErrInTheWay, "not put there by"},
		"a list beside the single plugin": {func(h *host) {
			h.file("etc/cni/net.d/05-old.conf", bridgeSingle)
			h.file("etc/cni/net.d/05-old.conflist", bridgeList)
		}, ErrInTheWay, "05-old.conflist"},
		"a daemon without a unit": {func(h *host) { h.running = true }, ErrRunning, "stop it"},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			test.prepare(h)
			before := h.tree()
			err := Install(t.Context(), h.Options)
			if !errors.Is(err, test.want) || !strings.Contains(err.Error(), test.says) {
				t.Errorf("got %v, want %v saying %q", err, test.want, test.says)
			}
			if err := os.Remove(h.StateDir); err != nil {
				t.Error(err)
			}
			if err := os.Remove(filepath.Dir(h.StateDir)); err == nil {
				t.Error("state directory was the only one")
			}
			h.wantTree("refused", h.tree(), before)
		})
	}
}

// A daemon that nobody stops would put back what is taken off.
func TestUninstallRefuses(t *testing.T) {
	h := newHost(t)
	h.Unit = nil
	h.install()
	installed := h.tree()
	h.running = true
	if _, err := Uninstall(t.Context(), h.Options); !errors.Is(err, ErrRunning) {
		t.Errorf("got %v, want ErrRunning", err)
	}
	h.wantTree("refused", h.tree(), installed)
}

func TestTwoAtOnce(t *testing.T) {
	h := newHost(t)
	before := h.tree()
	var group sync.WaitGroup
	errs := make([]error, 8)
	for i := range errs {
		o := h.Options
		o.Unit = nil
		group.Go(func() {
			if i%2 == 0 {
				errs[i] = Install(t.Context(), o)
			} else {
				_, errs[i] = Uninstall(t.Context(), o)
			}
		})
	}
	group.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	h.Unit = nil
	h.uninstall()
	h.wantTree("uninstalled", h.tree(), before)
}

func TestLocked(t *testing.T) {
	h := newHost(t)
	unlock, err := lock(t.Context(), h.StateDir)
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := Install(ctx, h.Options); !errors.Is(err, ErrLocked) {
		t.Errorf("got %v, want ErrLocked", err)
	}
}

// A line that was not written to its end is of a change that was not made.
func TestTornLog(t *testing.T) {
	h := newHost(t)
	before := h.tree()
	h.install()
	path := filepath.Join(h.StateDir, logName)
	f, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Fprint(f, `{"did":"fi`); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	h.write(filepath.Join(h.Source, "podgate"), "newer")
	h.install()
	for line := range strings.Lines(h.read("var/lib/podgate/" + logName)) {
		var r Record
		if err := json.Unmarshal([]byte(line), &r); err != nil || r.Did == "" || r.Path == "" || r.Undo == "" || r.Time.IsZero() {
			t.Errorf("line %q: %v", line, err)
		}
	}
	h.uninstall()
	h.wantTree("uninstalled", h.tree(), before)

	h.install()
	h.file("var/lib/podgate/"+logName, "{}\nnonsense\n")
	if _, err := Uninstall(t.Context(), h.Options); err == nil || !strings.Contains(err.Error(), "line 2") {
		t.Errorf("broken log: %v", err)
	}
}
