// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package install

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/fsnotify/fsnotify"

	"github.com/podgate/podgate/install/conflist"
)

// Watcher keeps podgate installed: it waits for a network that comes later, and
// puts its entry back when the owner of the network writes the file anew, or
// another one that the runtime takes before it.
type Watcher struct {
	Options
	// Merged is called after the entry was put into a file: containers that
	// were started since the file was written have no gate. It may be nil.
	Merged func(context.Context)
	// Report is told after each look what keeps podgate from being part of the
	// network; nil if nothing does. It may be nil.
	Report func(error)

	pace pace
}

// pace of a watcher.
type pace struct {
	// quiet is how long a directory has to rest, so that what is being written
	// is whole; busy how long it is given to.
	quiet, busy time.Duration
	// rescan is how often a look is taken although nothing was heard of.
	rescan time.Duration
	// once is how long one look may take.
	once time.Duration

	throttle
}

// throttle slows down who does the same again and again.
type throttle struct {
	// limit times within window are a fight. What is in one is done after
	// first, then after twice as long each time, up to longest.
	limit                  int
	window, first, longest time.Duration

	times []time.Time
	delay time.Duration
	next  time.Time
}

func defaultPace() pace {
	return pace{
		quiet: 100 * time.Millisecond, busy: time.Second, rescan: 30 * time.Second, once: time.Minute,
		throttle: throttle{limit: 5, window: time.Minute, first: 5 * time.Second, longest: 5 * time.Minute},
	}
}

// done notes that it was done now and says how long to leave it: not at all
// unless there is a fight.
func (t *throttle) done(now time.Time) time.Duration {
	if t.delay > 0 && now.Sub(t.next) > 2*t.delay {
		t.delay, t.times = 0, nil // There was peace meanwhile.
	}
	recent := t.times[:0]
	for _, at := range t.times {
		if now.Sub(at) < t.window {
			recent = append(recent, at)
		}
	}
	t.times = append(recent, now)
	switch {
	case t.delay > 0:
		t.delay = min(2*t.delay, t.longest)
	case len(t.times) >= t.limit:
		t.delay = t.first
	}
	t.next = now.Add(t.delay)
	return t.delay
}

// written is what is known of who wrote a file without podgate's entry. The
// kernel tells who opens a file only while he has it open.
type written struct {
	at      time.Time
	owner   uint32
	plugins []string
}

func (w written) String() string {
	return fmt.Sprintf("written at %s by user %d, with the plugins %s", w.at.Format(time.TimeOnly), w.owner, strings.Join(w.plugins, ", "))
}

// Watch installs podgate, and then keeps its entry where the runtime finds it,
// until ctx ends. While there is no network, or one that it cannot be part of,
// it says so and waits. It fails with [ErrWatched] if there is another watcher,
// and where [Install] does for other reasons.
func (w Watcher) Watch(ctx context.Context) error {
	if w.pace.quiet == 0 {
		w.pace = defaultPace()
	}
	if w.Logger == nil {
		w.Logger = slog.New(slog.DiscardHandler)
	}
	end, err := watching(w.StateDir)
	if err != nil {
		return err
	}
	defer end()
	events, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("watch %s: %w", w.ConfDir, err)
	}
	defer events.Close()
	installed, said := false, ""
	for {
		w.follow(events)
		path, err := w.look(ctx, installed)
		if ctx.Err() != nil {
			return nil
		}
		if w.Report != nil {
			w.Report(err)
		}
		switch {
		case err == nil:
			installed, said = true, ""
			if dir := filepath.Dir(path); path != "" && dir != w.ConfDir {
				_ = events.Add(dir) // Of multus. The next look comes anyway.
			}
		case !installed && !ofNetwork(err):
			return err
		case said != err.Error():
			said = err.Error()
			w.Logger.Warn("podgate is not part of the network, waiting for it to change", "error", err)
		}
		if !w.wait(ctx, events) {
			return nil
		}
	}
}

// ofNetwork: the network is not there or not fit, which its owner may change.
func ofNetwork(err error) bool {
	for _, known := range []error{
		conflist.ErrNone, conflist.ErrDelegate, conflist.ErrList, conflist.ErrNoPlugins, conflist.ErrTwice, conflist.ErrVersion,
	} {
		if errors.Is(err, known) {
			return true
		}
	}
	return false
}

// look installs podgate, or puts its entry back where it is missing, and returns
// the file that has it.
func (w *Watcher) look(ctx context.Context, installed bool) (path string, err error) {
	ctx, cancel := context.WithTimeout(ctx, w.pace.once)
	defer cancel()
	merged := true
	if installed {
		path, merged, err = w.restore(ctx)
	} else {
		err = Install(ctx, w.Options)
	}
	if err == nil && merged && w.Merged != nil {
		w.Merged(ctx)
	}
	return path, err
}

// restore puts the entry back, unless a fight is on and it is too early.
func (w *Watcher) restore(ctx context.Context) (path string, merged bool, err error) {
	n, done, err := begin(ctx, w.Options)
	if err != nil {
		return "", false, err
	}
	defer done()
	f, steps, err := n.merge()
	if err != nil || len(steps) == 0 {
		return f.Path, false, err
	}
	_, _, again := n.changes.find(KindMerge, f.Path)
	if _, _, converted := n.changes.find(KindConvert, f.ListPath()); converted {
		again = true
	}
	if again && time.Now().Before(w.pace.next) {
		return f.Path, false, nil
	}
	by, err := author(f)
	if err != nil {
		return f.Path, false, err
	}
	if err := n.run(ctx, steps); err != nil {
		return f.Path, false, err
	}
	if !again {
		w.Logger.Info("the runtime has another network, podgate is part of it now", "file", f.Path, "found", by)
		return f.Path, true, nil
	}
	if delay := w.pace.done(time.Now()); delay > 0 {
		w.Logger.Error("somebody keeps taking podgate out of the network: its entry is put back ever more seldom, and pods started without it have no gate",
			"file", f.Path, "found", by, "times", len(w.pace.times), "next", delay)
	} else {
		w.Logger.Warn("podgate had been taken out of the network, and is back", "file", f.Path, "found", by)
	}
	return f.Path, true, nil
}

// author is what can be known of who wrote a file.
func author(f conflist.File) (written, error) {
	info, err := os.Stat(f.Path)
	if err != nil {
		return written{}, err
	}
	b, err := os.ReadFile(f.Path)
	if err != nil {
		return written{}, err
	}
	by := written{at: info.ModTime(), plugins: f.Plugins(b)}
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		by.owner = st.Uid
	}
	return by, nil
}

// follow watches the directory, or while it is not there the nearest that is.
func (w *Watcher) follow(events *fsnotify.Watcher) {
	for dir := w.ConfDir; ; dir = filepath.Dir(dir) {
		err := events.Add(dir)
		if err == nil || dir == filepath.Dir(dir) {
			return
		}
		if !errors.Is(err, fs.ErrNotExist) {
			w.Logger.Warn("changes are seen late", "directory", dir, "error", err)
			return
		}
	}
}

// wait returns true when it is time to look, false when ctx is done.
func (w *Watcher) wait(ctx context.Context, events *fsnotify.Watcher) bool {
	rescan := time.NewTimer(w.pace.rescan)
	defer rescan.Stop()
	var settled, due <-chan time.Time
	if left := time.Until(w.pace.next); left > 0 {
		due = time.After(left)
	}
	var latest time.Time
	for {
		select {
		case <-ctx.Done():
			return false
		case <-rescan.C:
			return true
		case <-due:
			return true
		case <-settled:
			return true
		case err := <-events.Errors:
			w.Logger.Warn("watch network configuration", "error", err)
		case <-events.Events:
		}
		now := time.Now()
		if latest.IsZero() {
			latest = now.Add(w.pace.busy)
		}
		settled = time.After(min(w.pace.quiet, latest.Sub(now)))
	}
}
