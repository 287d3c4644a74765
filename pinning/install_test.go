// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package pinning_test

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"

	"github.com/podgate/podgate/bpf"
	"github.com/podgate/podgate/pinning"
)

func TestOpenFindsNothing(t *testing.T) {
	l := newNode(t)
	if _, err := pinning.Open(t.Context(), l.options); !errors.Is(err, pinning.ErrNotInstalled) {
		t.Errorf("Open without an instance: %v", err)
	}
}

func TestOptionsThatCannotWork(t *testing.T) {
	for name, o := range map[string]pinning.Options{
		"relative":   {Layout: pinning.Layout{BPFFS: "bpf"}},
		"nested":     {Layout: pinning.Layout{Name: "a/b"}},
		"parent":     {Layout: pinning.Layout{Name: ".."}},
		"odd ring":   {Capacity: pinning.Capacity{EventBytes: 5000}},
		"small ring": {Capacity: pinning.Capacity{EventBytes: 2048}},
		"endpoints":  {Capacity: pinning.Capacity{Endpoints: 4096 + 1}},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := pinning.Ensure(t.Context(), o); !errors.Is(err, pinning.ErrInvalid) {
				t.Errorf("Ensure: %v", err)
			}
			if _, err := pinning.Open(t.Context(), o); !errors.Is(err, pinning.ErrInvalid) {
				t.Errorf("Open: %v", err)
			}
		})
	}
}

// ids of the pinned maps and programs: they change when something is made anew.
func (l *lab) ids() []string {
	l.t.Helper()
	var out []string
	for _, pattern := range []string{"maps", "progs"} {
		names, err := filepath.Glob(filepath.Join(l.options.Layout.VersionDir(), pattern, "*"))
		if err != nil || len(names) == 0 {
			l.t.Fatalf("%s: %v, %v", pattern, names, err)
		}
		for _, name := range names {
			st, err := os.Stat(name)
			if err != nil {
				l.t.Fatal(err)
			}
			out = append(out, st.Name()+st.ModTime().Format(time.RFC3339Nano))
		}
	}
	return out
}

func TestEnsureAdopts(t *testing.T) {
	l := newLab(t)
	before := l.ids()
	if len(before) != len(wantPins) {
		t.Errorf("pinned are %v, not %v", before, wantPins)
	}
	e, _ := l.add(request(l.veth("a"), "10.0.0.1"))
	l.options.Capacity.Flows *= 2 // who adopts takes what is there
	second := l.ensure()
	if after := l.ids(); !slices.Equal(before, after) {
		t.Errorf("adopting changed the pins:\n%v\n%v", before, after)
	}
	got, _, err := second.Endpoint(e.Key)
	if err != nil || got.ID != e.ID {
		t.Errorf("the second process sees endpoint %+v, %v", got, err)
	}
	usage, err := second.Usage()
	if err != nil {
		t.Fatal(err)
	}
	for _, u := range usage {
		if u.Name == bpf.DatapathMapFlows && u.Max != small.Flows {
			t.Errorf("flows holds %d after adoption, %d before", u.Max, small.Flows)
		}
	}
}

var wantPins = []string{
	"backends", "blocks", "cells", "claims", "classes", "drop_counters", "endpoint_counters", "endpoints", "events", "flows",
	"fragments", "frontends", "gates", "handovers", "joins", "lost_events", "neighbours", "peers", "pods", "policy_info", "rule_counters", "rule_info",
	"ruleset_policies", "rulesets", "services", "sources", "state", "from_pod", "to_pod",
}

func TestEnsureOnceOfMany(t *testing.T) {
	l := newNode(t)
	states := make([]*pinning.State, 8)
	var all sync.WaitGroup
	for i := range states {
		all.Go(func() {
			s, err := pinning.Ensure(t.Context(), l.options)
			if err != nil {
				t.Errorf("Ensure: %v", err)
				return
			}
			states[i] = s
		})
	}
	all.Wait()
	l.state = l.open()
	host := l.veth("a")
	e, _ := l.add(request(host))
	for _, s := range states {
		if s == nil {
			continue
		}
		if _, _, err := s.Endpoint(e.Key); err != nil {
			t.Errorf("one of the processes has other maps: %v", err)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestInstancesDoNotMeet(t *testing.T) {
	l := newLab(t)
	e, _ := l.add(request(l.veth("a"), "10.0.0.1"))
	other := *l
	other.options.Layout.Name = "second"
	other.state = other.ensure()
	if _, _, err := other.state.Endpoint(e.Key); !errors.Is(err, pinning.ErrNotFound) {
		t.Errorf("the second instance knows the first one's endpoint: %v", err)
	}
	other.wantHoldings(map[string]int{})
	if done := other.repair(); len(done) != 0 {
		t.Errorf("the second instance repairs %v", done)
	}
	if err := l.check(e.Key, e); err != nil {
		t.Errorf("after the second instance was there: %v", err)
	}
}

func TestEnsureAfterACrash(t *testing.T) {
	l := newNode(t)
	// What a process leaves that dies between its first pin and the rename.
	leftover := filepath.Join(l.options.Layout.Dir(), "new", "maps")
	if err := os.MkdirAll(leftover, 0o700); err != nil {
		t.Fatal(err)
	}
	m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if err := m.Pin(filepath.Join(leftover, "gates")); err != nil {
		t.Fatal(err)
	}
	if _, err := pinning.Open(t.Context(), l.options); !errors.Is(err, pinning.ErrNotInstalled) {
		t.Errorf("Open of half an instance: %v", err)
	}
	l.state = l.ensure()
	l.add(request(l.veth("a")))
	if _, err := os.Stat(filepath.Join(l.options.Layout.Dir(), "new")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the leftover is still there: %v", err)
	}
}

// repin puts another map in the place of a pinned one.
func (l *lab) repin(spec *ebpf.MapSpec, name string) {
	l.t.Helper()
	m, err := ebpf.NewMap(spec)
	if err != nil {
		l.t.Fatal(err)
	}
	defer m.Close()
	path := l.options.Layout.MapPath(name)
	if err := os.Remove(path); err != nil {
		l.t.Fatal(err)
	}
	if err := m.Pin(path); err != nil {
		l.t.Fatal(err)
	}
}

func TestABI(t *testing.T) {
	datapath, err := bpf.LoadDatapath()
	if err != nil {
		t.Fatal(err)
	}
	size := func(s *ebpf.MapSpec) {
		s.ValueSize += 8
		s.Value = nil
	}
	for name, change := range map[string]struct {
		of   string
		what func(*ebpf.MapSpec)
		says string
	}{
		"value size": {bpf.DatapathMapGates, size, "bytes"},
		"type":       {bpf.DatapathMapFlows, func(s *ebpf.MapSpec) { s.Type = ebpf.Hash; s.Flags = unix.BPF_F_NO_PREALLOC }, "LRU"},
		"flags":      {bpf.DatapathMapState, func(s *ebpf.MapSpec) { s.Flags = 0 }, "flags"},
		"a field's name": {bpf.DatapathMapPeers, func(s *ebpf.MapSpec) {
			s.Value = &btf.Struct{Name: "peer", Size: 8, Members: []btf.Member{
				{Name: "colour", Type: &btf.Int{Name: "u32", Size: 4}},
				{Name: "owner", Offset: 32, Type: &btf.Int{Name: "u16", Size: 2}},
				{Name: "tag", Offset: 48, Type: &btf.Int{Name: "u16", Size: 2}},
			}}
		}, "colour"},
		"fields swapped": {bpf.DatapathMapRuleCounters, func(s *ebpf.MapSpec) {
			u64 := &btf.Int{Name: "u64", Size: 8}
			s.Value = &btf.Struct{Name: "counter", Size: 16, Members: []btf.Member{
				{Name: "bytes", Type: u64}, {Name: "packets", Offset: 64, Type: u64},
			}}
		}, "struct counter"},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t)
			spec := datapath.Maps[change.of].Copy()
			spec.MaxEntries = l.pinned(change.of).MaxEntries()
			change.what(spec)
			l.repin(spec, change.of)
			_, err := pinning.Ensure(t.Context(), l.options)
			if !errors.Is(err, pinning.ErrABI) || !strings.Contains(err.Error(), "map "+change.of+":") || !strings.Contains(err.Error(), change.says) {
				t.Errorf("Ensure: %v", err)
			}
		})
	}
	t.Run("ADD", func(t *testing.T) {
		l := newLab(t)
		spec := datapath.Maps[bpf.DatapathMapClaims].Copy()
		size(spec)
		l.repin(spec, bpf.DatapathMapClaims)
		l.state = l.open()
		if _, _, err := l.tryAdd(request(l.veth("a"), "10.0.0.1")); !errors.Is(err, pinning.ErrABI) || !strings.Contains(err.Error(), "claims") {
			t.Errorf("Add: %v", err)
		}
	})
	t.Run("missing", func(t *testing.T) {
		l := newLab(t)
		if err := os.Remove(l.options.Layout.MapPath(bpf.DatapathMapJoins)); err != nil {
			t.Fatal(err)
		}
		if _, err := pinning.Ensure(t.Context(), l.options); !errors.Is(err, pinning.ErrNotInstalled) || !strings.Contains(err.Error(), "joins") {
			t.Errorf("Ensure: %v", err)
		}
	})
}

func TestEnsureMounts(t *testing.T) {
	needRoot(t)
	dir := filepath.Join(t.TempDir(), "not", "there")
	t.Cleanup(func() {
		for unix.Unmount(dir, unix.MNT_DETACH) == nil {
		}
	})
	options := pinning.Options{Layout: pinning.Layout{BPFFS: dir}, Capacity: small}
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			s, err := pinning.Ensure(t.Context(), options)
			if err != nil {
				t.Error(err)
				return
			}
			if err := errors.Join(s.Ready(t.Context()), s.Close()); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil || fs.Type != unix.BPF_FS_MAGIC {
		t.Fatalf("%s is a file system of type %#x, %v", dir, fs.Type, err)
	}
	if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	if err := unix.Statfs(dir, &fs); err != nil || fs.Type == unix.BPF_FS_MAGIC {
		t.Errorf("it was mounted twice: type %#x, %v", fs.Type, err)
	}
}

func TestEnsureMayNotMount(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	if _, err := pinning.Ensure(t.Context(), pinning.Options{Layout: pinning.Layout{BPFFS: dir}, Capacity: small, NoMount: true}); !errors.Is(err, pinning.ErrNoBPFFS) {
		t.Errorf("Ensure: %v", err)
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil || fs.Type == unix.BPF_FS_MAGIC {
		t.Errorf("it was mounted: type %#x, %v", fs.Type, err)
	}
}

// held locks the instance as another process would.
func (l *lab) held() (release func()) {
	l.t.Helper()
	dir, err := os.Open(l.options.Layout.Dir())
	if err != nil {
		l.t.Fatal(err)
	}
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX); err != nil {
		l.t.Fatal(err)
	}
	return func() { _ = dir.Close() }
}

func TestLock(t *testing.T) {
	l := newLab(t)
	e, _ := l.add(request(l.veth("a"), "10.0.0.1"))
	before := l.holdings()
	l.options.LockTimeout = 20 * time.Millisecond
	l.state = l.open()
	release := l.held()
	ctx := t.Context()
	host := l.veth("b")
	for name, change := range map[string]func() error{
		"Ensure": func() error { _, err := pinning.Ensure(ctx, l.options); return err },
		"Add":    func() error { _, _, err := l.state.Add(ctx, request(host, "10.0.0.2")); return err },
		"Delete": func() error { return l.state.Delete(ctx, e.Key) },
		"GC":     func() error { _, err := l.state.GC(ctx, "net", nil); return err },
		"Claim":  func() error { return l.state.Claim(ctx, e.Key, []netip.Addr{netip.MustParseAddr("10.0.0.9")}) },
		"Repair": func() error { _, err := l.state.Repair(ctx); return err },
	} {
		if err := l.Do(change); !errors.Is(err, pinning.ErrLocked) {
			t.Errorf("%s beside another writer: %v", name, err)
		}
	}
	l.wantHoldings(before)
	// Reading takes no lock.
	if err := errors.Join(l.state.Ready(ctx), l.check(e.Key, e)); err != nil {
		t.Errorf("reading beside a writer: %v", err)
	}
	release()
	l.delete(e.Key)
}

func TestLockIsWaitedFor(t *testing.T) {
	l := newLab(t)
	release := l.held()
	added := make(chan error, 1)
	host := l.veth("a")
	go func() {
		_, _, err := l.tryAdd(request(host))
		added <- err
	}()
	select {
	case err := <-added:
		t.Fatalf("Add did not wait for the lock: %v", err)
	case <-time.After(30 * time.Millisecond):
	}
	release()
	if err := <-added; err != nil {
		t.Error(err)
	}
	// The end of the caller's context ends the wait too.
	defer l.held()()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if err := l.state.Delete(ctx, request(host).Key); !errors.Is(err, pinning.ErrLocked) {
		t.Errorf("Delete: %v", err)
	}
}

func TestEventsHaveOneConsumer(t *testing.T) {
	l := newLab(t)
	first, err := l.state.Events(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.open().Events(t.Context()); !errors.Is(err, pinning.ErrLocked) {
		t.Errorf("a second consumer: %v", err)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	next, err := l.open().Events(t.Context())
	if err != nil {
		t.Fatalf("after the first one left: %v", err)
	}
	if err := next.Close(); err != nil {
		t.Error(err)
	}
}
