// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package source

import (
	"context"
	"errors"
	"io/fs"
	"path/filepath"
	"time"

	"github.com/fsnotify/fsnotify"
)

// watcher says when it is time to look at a directory again: some time after a
// change, so that what is being written is whole, and now and then anyway,
// because not every file system tells.
type watcher struct {
	opts DirectoryOptions
	fs   *fsnotify.Watcher // nil if the kernel has none left
	// err is why changes are not seen at once.
	err error
	// followed folders, see follow.
	followed map[string]string
	// again asks for another look: a folder was not followed before, and what
	// happened in it until now went unseen.
	again bool
}

func newWatcher(opts DirectoryOptions) *watcher {
	w := &watcher{opts: opts, followed: make(map[string]string)}
	w.fs, w.err = fsnotify.NewWatcher()
	return w
}

func (w *watcher) close() {
	if w.fs != nil {
		if err := w.fs.Close(); err != nil {
			w.opts.Logger.Warn("close inotify", "error", err)
		}
	}
}

// follow watches exactly the given folders: for a change of the one name given,
// or of anything if that is empty. A folder that came back under its old name
// is followed again.
func (w *watcher) follow(folders map[string]string) {
	if w.fs == nil {
		return
	}
	for path := range w.followed {
		if _, ok := folders[path]; !ok {
			delete(w.followed, path)
			if err := w.fs.Remove(path); err != nil && !errors.Is(err, fsnotify.ErrNonExistentWatch) {
				w.opts.Logger.Debug("unwatch", "path", path, "error", err)
			}
		}
	}
	w.err = nil
	for path, only := range folders {
		if err := w.fs.Add(path); err != nil {
			delete(w.followed, path)
			if errors.Is(err, fs.ErrNotExist) {
				w.again = true // Gone since the look that found it.
			} else {
				w.err = err
			}
			continue
		}
		if was, ok := w.followed[path]; !ok || was != only {
			w.followed[path] = only
			w.again = true
		}
	}
}

// wait returns true when it is time to look, false when ctx is done. It gives
// a directory that never rests ten times the settling time.
func (w *watcher) wait(ctx context.Context) bool {
	rescan := time.NewTimer(w.opts.Rescan)
	defer rescan.Stop()
	var (
		settled <-chan time.Time
		latest  time.Time
	)
	changed := func() {
		now := time.Now()
		if latest.IsZero() {
			latest = now.Add(10 * w.opts.Settle)
		}
		settled = time.After(min(w.opts.Settle, latest.Sub(now)))
	}
	if w.again {
		w.again = false
		changed()
	}
	var (
		events chan fsnotify.Event
		errs   chan error
	)
	if w.fs != nil {
		events, errs = w.fs.Events, w.fs.Errors
	}
	for {
		select {
		case <-ctx.Done():
			return false
		case <-rescan.C:
			return true
		case <-settled:
			return true
		case event := <-events:
			if w.concerns(event) {
				changed()
			}
		case err := <-errs:
			w.opts.Logger.Warn("watch policy directory", "error", err)
			changed()
		}
	}
}

// concerns leaves out changes that follow was not asked for.
func (w *watcher) concerns(event fsnotify.Event) bool {
	only := w.followed[filepath.Dir(event.Name)]
	return only == "" || only == filepath.Base(event.Name)
}
