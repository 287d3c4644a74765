// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package source

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/podgate/podgate/syncd/manifest"
)

// DirectoryOptions configure a [Directory].
type DirectoryOptions struct {
	// Path of the directory.
	Path string
	// Cache is a directory for the last good version of each file, so that a
	// file that is broken when the process starts keeps its policy too. Empty
	// for none.
	Cache string
	// ReadOnly leaves the cache as it is, for who reads beside the daemon.
	ReadOnly bool
	// Settle is how long after a change the files are left to settle, default
	// 100 ms; Rescan how often they are read without a change seen, default
	// 30 s.
	Settle, Rescan time.Duration
	Logger         *slog.Logger
}

// Directory is a [Source] of the manifests (*.yaml, *.yml, *.json) in a
// directory. Hidden files and subdirectories are not read.
//
// A file that is broken, unreadable or truncated to nothing keeps the objects
// of its last good version. Removing a file removes its objects. Of an object
// defined twice the definition in the first file by name counts.
type Directory struct {
	opts  DirectoryOptions
	cache cache
	// files is what each file contributes, by name; state the sum of it.
	files map[string]*file
	state map[manifest.Key]manifest.Object
	// since is when each standing problem was first seen.
	since map[Problem]time.Time
}

// file is the last good version of a file and what is wrong with the present.
type file struct {
	// sum of the content last read, good or not.
	sum     [sha256.Size]byte
	read    bool
	objects []manifest.Object
	faults  []string
}

// NewDirectory is a source of the manifests in a directory, which is read later.
func NewDirectory(opts DirectoryOptions) *Directory {
	opts.Settle = cmp.Or(opts.Settle, 100*time.Millisecond)
	opts.Rescan = cmp.Or(opts.Rescan, 30*time.Second)
	if opts.Logger == nil {
		opts.Logger = slog.New(slog.DiscardHandler)
	}
	d := &Directory{
		opts:  opts,
		files: make(map[string]*file),
		state: make(map[manifest.Key]manifest.Object),
		since: make(map[Problem]time.Time),
	}
	if opts.Cache != "" {
		d.cache = newCache(opts.Cache, opts.Path, opts.ReadOnly)
	}
	return d
}

// Load reads the directory. It fails when the directory cannot be read; what
// is wrong with its files is in the batch.
func (d *Directory) Load(context.Context) (Batch, error) {
	batch, err := d.scan()
	if err != nil {
		return Batch{}, fmt.Errorf("policy directory: %w", err)
	}
	d.date(batch.Problems)
	return batch, nil
}

// Run delivers the state of the directory and then its changes. When the
// directory cannot be read later, everything stays as it was.
func (d *Directory) Run(ctx context.Context, deliver func(Batch)) error {
	w := newWatcher(d.opts)
	defer w.close()
	w.follow(d.folders())
	batch, err := d.Load(ctx)
	if err != nil {
		return err
	}
	for {
		deliver(batch)
		standing := batch.Problems
		for {
			w.follow(d.folders())
			if !w.wait(ctx) {
				return nil
			}
			if batch = d.look(w); len(batch.Set)+len(batch.Gone) > 0 || !slices.Equal(batch.Problems, standing) {
				break
			}
		}
	}
}

// look scans the directory while it is watched.
func (d *Directory) look(w *watcher) Batch {
	batch, err := d.scan()
	if err != nil {
		batch = d.difference()
		batch.Problems = append(batch.Problems, Problem{
			Subject: d.opts.Path,
			Reason:  fmt.Sprintf("%v; everything that was read before stays in force", err),
		})
	}
	if w.err != nil {
		batch.Problems = append(batch.Problems, Problem{
			Subject: d.opts.Path,
			Reason:  fmt.Sprintf("changes are only noticed every %v: %v", d.opts.Rescan, w.err),
		})
	}
	d.date(batch.Problems)
	return batch
}

// folders are where changes of the directory show: its parent, where it may be
// a symbolic link that is swapped, itself, and where its files lead to. The
// value is the one name that counts there, or empty.
func (d *Directory) folders() map[string]string {
	out := make(map[string]string)
	clean := filepath.Clean(d.opts.Path)
	if parent, err := filepath.EvalSymlinks(filepath.Dir(clean)); err == nil {
		out[parent] = filepath.Base(clean)
	}
	if real, err := filepath.EvalSymlinks(clean); err == nil {
		out[real] = ""
	}
	for name := range d.files {
		if real, err := filepath.EvalSymlinks(d.path(name)); err == nil {
			out[filepath.Dir(real)] = ""
		}
	}
	return out
}

// scan reads what has changed and answers the difference to the scan before.
// With an error nothing has changed.
func (d *Directory) scan() (Batch, error) {
	names, err := d.list()
	if err != nil {
		return Batch{}, err
	}
	if len(d.files) == 0 {
		d.cache.prune(names)
	}
	for _, name := range names {
		if d.files[name] == nil {
			d.files[name] = &file{}
		}
		d.refresh(name, d.files[name])
	}
	for name := range d.files {
		if !slices.Contains(names, name) {
			d.opts.Logger.Info("file removed", "file", d.path(name))
			delete(d.files, name)
			d.forget(name)
		}
	}
	return d.difference(), nil
}

// list names the manifests in the directory, sorted.
func (d *Directory) list() ([]string, error) {
	entries, err := os.ReadDir(d.opts.Path)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if !isManifest(e.Name()) || e.IsDir() {
			continue
		}
		info, err := os.Stat(d.path(e.Name()))
		if err == nil && info.IsDir() {
			continue
		}
		if errors.Is(err, fs.ErrNotExist) {
			// Removed since, unless it is a symbolic link that leads nowhere.
			if _, err := os.Lstat(d.path(e.Name())); err != nil {
				continue
			}
		}
		names = append(names, e.Name())
	}
	return names, nil
}

// isManifest leaves out hidden files: editors' and the machinery of ConfigMap
// volumes (..data).
func isManifest(name string) bool {
	if strings.HasPrefix(name, ".") {
		return false
	}
	switch filepath.Ext(name) {
	case ".yaml", ".yml", ".json":
		return true
	}
	return false
}

func (d *Directory) path(name string) string { return filepath.Join(d.opts.Path, name) }

// refresh brings a file up to date. Whatever is wrong with it, its objects
// stay.
func (d *Directory) refresh(name string, f *file) {
	data, err := d.readFile(name)
	if err != nil {
		d.fail(name, f, []string{err.Error()})
		f.read = false
		return
	}
	sum := sha256.Sum256(data)
	if f.read && sum == f.sum {
		return
	}
	f.sum, f.read = sum, true
	objects, err := manifest.Decode(d.path(name), data)
	if err == nil && len(bytes.TrimSpace(data)) == 0 && len(d.lastGood(name, f)) > 0 {
		// Half of what overwrites a file in place is an empty file.
		err = &manifest.FileError{File: d.path(name), Line: 1, Reason: "the file is empty; remove it to remove its objects"}
	}
	if err != nil {
		d.fail(name, f, faults(err))
		return
	}
	f.objects, f.faults = objects, nil
	d.opts.Logger.Info("file read", "file", d.path(name), "objects", len(objects))
	if err := d.cache.store(name, data); err != nil {
		d.opts.Logger.Warn("last good version not kept", "file", d.path(name), "error", err)
	}
}

// readFile reads a regular file, also through symbolic links.
func (d *Directory) readFile(name string) ([]byte, error) {
	info, err := os.Stat(d.path(name))
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, &fs.PathError{Op: "read", Path: d.path(name), Err: errors.New("not a regular file")}
	}
	return os.ReadFile(d.path(name))
}

// fail records what is wrong with a file and recovers its last good version.
func (d *Directory) fail(name string, f *file, faults []string) {
	f.objects = d.lastGood(name, f)
	if slices.Equal(f.faults, faults) {
		return
	}
	f.faults = faults
	for _, fault := range faults {
		d.opts.Logger.Error("broken file", "file", d.path(name), "reason", fault, "kept", len(f.objects))
	}
}

// lastGood is what the file had before: in this process, or else in the cache.
func (d *Directory) lastGood(name string, f *file) []manifest.Object {
	if f.objects != nil {
		return f.objects
	}
	data, err := d.cache.load(name)
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			d.opts.Logger.Warn("last good version not readable", "file", d.path(name), "error", err)
		}
		return nil
	}
	objects, err := manifest.Decode(d.path(name), data)
	if err != nil {
		d.opts.Logger.Warn("last good version not readable", "file", d.path(name), "error", err)
		return nil
	}
	return objects
}

func (d *Directory) forget(name string) {
	if err := d.cache.remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		d.opts.Logger.Warn("last good version not removed", "file", d.path(name), "error", err)
	}
}

// faults lists the parts of a joined error.
func faults(err error) []string {
	var joined interface{ Unwrap() []error }
	if !errors.As(err, &joined) {
		return []string{err.Error()}
	}
	var out []string
	for _, err := range joined.Unwrap() {
		out = append(out, err.Error())
	}
	return out
}
