// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package install

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/podgate/podgate/install/conflist"
)

// watchedHost is a host whose network is watched.
type watchedHost struct {
	*host
	cancel context.CancelFunc
	failed chan error

	mu     sync.Mutex
	log    strings.Builder
	merged int
}

func (w *watchedHost) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.log.Write(p)
}

func (w *watchedHost) logged() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.log.String()
}

// times the entry was put into a file.
func (w *watchedHost) times() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.merged
}

func watch(h *host, p pace) *watchedHost {
	w := &watchedHost{host: h, failed: make(chan error, 1)}
	h.Unit = nil
	h.Logger = slog.New(slog.NewTextHandler(w, nil))
	var ctx context.Context
	ctx, w.cancel = context.WithCancel(h.t.Context())
	go func() {
		w.failed <- Watcher{Options: h.Options, pace: p, Merged: func(context.Context) {
			w.mu.Lock()
			w.merged++
			w.mu.Unlock()
		}}.Watch(ctx)
	}()
	h.t.Cleanup(w.stop)
	return w
}

// stop ends the watcher, which is no failure. It may be called again.
func (w *watchedHost) stop() {
	w.t.Helper()
	w.cancel()
	if err := <-w.failed; err != nil {
		w.t.Error(err)
	}
	w.failed <- nil
	if w.t.Failed() {
		w.t.Log(w.logged())
	}
}

// quick is a pace for tests, without a look that nothing has asked for.
func quick() pace {
	p := defaultPace()
	p.quiet, p.busy, p.rescan = 5*time.Millisecond, 50*time.Millisecond, time.Hour
	return p
}

// publish writes a file as a whole.
func (w *watchedHost) publish(path, text string) {
	w.t.Helper()
	path = filepath.Join(w.root, path)
	if err := os.WriteFile(path+".tmp", []byte(text), 0o644); err != nil {
		w.t.Fatal(err)
	}
	if err := os.Rename(path+".tmp", path); err != nil {
		w.t.Fatal(err)
	}
}

func (w *watchedHost) until(what string, ok func() bool) {
	w.t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			w.t.Fatalf("not %s\n%s", what, w.logged())
		}
	}
}

// has tells whether the file has podgate's entry.
func (w *watchedHost) has(path string) func() bool {
	return func() bool {
		b, err := os.ReadFile(filepath.Join(w.root, path))
		if err != nil {
			return false
		}
		merged, err := conflist.Merged(b)
		return err == nil && merged
	}
}

func TestWatch(t *testing.T) {
	h := newHost(t)
	if err := os.RemoveAll(h.ConfDir); err != nil {
		t.Fatal(err)
	}
	w := watch(h, quick())
	w.until("waiting", func() bool { return strings.Contains(w.logged(), "waiting for it to change") })
	if err := os.MkdirAll(h.ConfDir, 0o755); err != nil {
		t.Fatal(err)
	}
	w.publish("etc/cni/net.d/10-net.conflist", bridgeList)
	w.until("part of a network that comes later", w.has("etc/cni/net.d/10-net.conflist"))

	rewritten := strings.ReplaceAll(bridgeList, `"bridge" }`, `"bridge" }, { "type": "portmap" }`)
	w.publish("etc/cni/net.d/10-net.conflist", rewritten)
	w.until("back after the file was written anew", w.has("etc/cni/net.d/10-net.conflist"))
	w.until("said", func() bool { return strings.Contains(w.logged(), "with the plugins bridge, portmap") })

	w.publish("etc/cni/net.d/05-first.conflist", bridgeList)
	w.until("part of the network that is first by now", w.has("etc/cni/net.d/05-first.conflist"))

	w.publish("etc/cni/net.d/01-single.conf", bridgeSingle)
	w.until("part of a single plugin", w.has("etc/cni/net.d/01-single.conflist"))
	w.publish("etc/cni/net.d/01-single.conf", strings.ReplaceAll(bridgeSingle, "old", "new"))
	w.until("part of a single plugin again", func() bool {
		return w.has("etc/cni/net.d/01-single.conflist")() && strings.Contains(h.read("etc/cni/net.d/01-single.conflist"), `"new"`)
	})

	// What is being written in place is nothing to judge a network by.
	w.publish("etc/cni/net.d/01-single.conf", "{")
	w.publish("etc/cni/net.d/01-single.conf", bridgeSingle)
	w.until("part of a single plugin once more", func() bool { return strings.Contains(h.read("etc/cni/net.d/01-single.conflist"), `"old"`) })

	if _, err := Uninstall(t.Context(), h.Options); !errors.Is(err, ErrWatched) {
		t.Errorf("uninstall beside a watcher: %v, want ErrWatched", err)
	}
	if err := (Watcher{Options: h.Options}).Watch(t.Context()); !errors.Is(err, ErrWatched) {
		t.Errorf("second watcher: %v, want ErrWatched", err)
	}
	// A file that is written while it is moved aside takes no look of its own.
	w.until("told", func() bool { return w.times() >= 5 })
	w.stop()
	h.uninstall()
	for path, want := range map[string]string{"10-net.conflist": rewritten, "05-first.conflist": bridgeList, "01-single.conf": bridgeSingle} {
		if got := h.read("etc/cni/net.d/" + path); got != want {
			t.Errorf("in the end %s is %s", path, got)
		}
	}
	entries, err := os.ReadDir(h.ConfDir)
	if err != nil || len(entries) != 3 {
		t.Errorf("in the end there are %v (%v)", entries, err)
	}
}

// Two that each take the other's work for wrong would go on for ever.
func TestWatchFight(t *testing.T) {
	h := newHost(t)
	p := quick()
	p.first, p.longest = time.Hour, time.Hour
	w := watch(h, p)
	path := "etc/cni/net.d/10-net.conflist"
	w.until("installed", w.has(path))
	theirs := strings.ReplaceAll(bridgeList, `"bridge" }`, `"bridge" }, { "type": "other-gate" }`)
	for range p.limit {
		w.until("put back", w.has(path))
		w.publish(path, theirs)
	}
	w.until("said", func() bool { return strings.Contains(w.logged(), "somebody keeps taking podgate out") })
	if log := w.logged(); !strings.Contains(log, "times=5") || !strings.Contains(log, "with the plugins bridge, other-gate") ||
		!strings.Contains(log, fmt.Sprintf("by user %d", os.Getuid())) {
		t.Errorf("the log does not say who:\n%s", log)
	}
	before := w.times()
	w.publish(path, theirs)
	time.Sleep(100 * time.Millisecond)
	if w.has(path)() || w.times() != before {
		t.Error("the fight goes on")
	}
}

func TestThrottle(t *testing.T) {
	th := throttle{limit: 3, window: time.Minute, first: 10 * time.Second, longest: 30 * time.Second}
	start := time.Now()
	var got []time.Duration
	for _, at := range []int{0, 30, 70, 71, 81, 101, 131, 161, 400, 401, 402} {
		got = append(got, th.done(start.Add(time.Duration(at)*time.Second))/time.Second)
	}
	// Three within a minute at 71, four that keep up with it, then peace.
	if want := []time.Duration{0, 0, 0, 10, 20, 30, 30, 30, 0, 0, 10}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// What no change of the network can mend is an error at once.
func TestWatchFails(t *testing.T) {
	h := newHost(t)
	h.Source = h.root
	err := Watcher{Options: h.Options}.Watch(t.Context())
	if !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "podgate-cni") {
		t.Errorf("got %v", err)
	}
}
