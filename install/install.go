// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package install

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/podgate/podgate/conf"
	"github.com/podgate/podgate/install/conflist"
	"github.com/podgate/podgate/pinning"
)

// Errors that callers branch on.
var (
	// ErrLocked: another process is installing or uninstalling.
	ErrLocked = errors.New("another installer is at work")
	// ErrRunning: a daemon runs that this installer did not start.
	ErrRunning = errors.New("podgate sync is running")
	// ErrWatched: a watcher runs.
	ErrWatched = errors.New("podgate install --watch is running")
	// ErrInTheWay: something is where a file of podgate would go.
	ErrInTheWay = errors.New("in the way")
)

// The binaries. podgate-ipam is podgate-cni by another name.
const (
	pluginName  = conflist.Type
	ipamName    = "podgate-ipam"
	commandName = "podgate"
)

// Options of [Install] and [Uninstall]. Paths are absolute.
type Options struct {
	// ConfDir is where the runtime looks for networks, "/etc/cni/net.d", and
	// BinDir where it looks for plugins, "/opt/cni/bin".
	ConfDir, BinDir string
	// Conflist is the file to merge into; when empty the one that the runtime
	// takes out of ConfDir.
	Conflist string
	// CommandDir is where podgate itself goes, "/usr/local/bin"; when empty it
	// stays where it is.
	CommandDir string
	// Source is the directory that the binaries are copied from.
	Source string
	// StateDir has the log of what was done, "/var/lib/podgate".
	StateDir string
	// CacheDir is where runtimes keep what they attached containers with:
	// "/var/lib/cni", libcni's default.
	CacheDir string
	// RunDir is the daemon's; it goes with the pinned state.
	RunDir string
	// Entry are further keys of podgate-cni's object, as a JSON object.
	Entry json.RawMessage
	// Pins is the pinned state to make, and to remove.
	Pins pinning.Options
	// Unit is the systemd unit of the daemon; nil leaves systemd alone.
	Unit *Unit
	// Daemon tells whether a daemon of the instance runs.
	Daemon func() (running bool, err error)
	// Settle is how long runtimes may take to read a changed configuration
	// before the plugin in it goes.
	Settle time.Duration
	// Version of podgate, for the log.
	Version string
	// Logger gets what is noteworthy beside the steps; nothing when nil.
	Logger *slog.Logger
	// DryRun changes nothing.
	DryRun bool
	// Step is called with each step before it is done, or would be.
	Step func(what string)

	// fault is called at every point where a process may die.
	fault func(where string)
	// ensure and unpins make and remove the pinned state.
	ensure, unpins func(context.Context, pinning.Options) error
}

// node is one call of Install or Uninstall.
type node struct {
	Options
	changes *changeLog
}

// step is one thing to do. what says it in words.
type step struct {
	what string
	do   func(context.Context) error
}

func (n *node) point(where string) {
	if n.fault != nil {
		n.fault(where)
	}
}

// begin locks the node and reads the log. With [Options.DryRun] it only reads.
func begin(ctx context.Context, o Options) (*node, func(), error) {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Step == nil {
		o.Step = func(string) {}
	}
	if o.Daemon == nil {
		o.Daemon = func() (bool, error) { return false, nil }
	}
	if o.ensure == nil {
		o.ensure, o.unpins = ensure, unpin
	}
	unlock := func() {}
	if !o.DryRun {
		var err error
		if unlock, err = lock(ctx, o.StateDir); err != nil {
			return nil, nil, err
		}
	}
	changes, err := readLog(o.StateDir)
	if err != nil {
		unlock()
		return nil, nil, err
	}
	return &node{Options: o, changes: changes}, unlock, nil
}

func (n *node) run(ctx context.Context, steps []step) error {
	for _, s := range steps {
		if err := ctx.Err(); err != nil {
			return err
		}
		n.Step(s.what)
		if n.DryRun {
			continue
		}
		if err := s.do(ctx); err != nil {
			return fmt.Errorf("%s: %w", s.what, err)
		}
	}
	return nil
}

// note records a change before it is made.
func (n *node) note(r Record) error {
	r.Time, r.Version = time.Now().UTC(), n.Version
	n.point("note " + r.Path)
	if err := n.changes.add(r); err != nil {
		return err
	}
	n.point("noted " + r.Path)
	return nil
}

// Install puts podgate on the node. What is there already, and as it should be,
// is left; so it also upgrades, and completes what a process that died has
// begun. Nothing names podgate-cni before all that it needs is in place.
func Install(ctx context.Context, o Options) error {
	n, done, err := begin(ctx, o)
	if err != nil {
		return err
	}
	defer done()
	steps, err := n.installation()
	if err != nil {
		return err
	}
	return n.run(ctx, steps)
}

// installation is what there is to do. It reads everything and changes nothing,
// so that what cannot work fails before anything was done.
func (n *node) installation() ([]step, error) {
	_, merge, err := n.merge()
	if err != nil {
		return nil, err
	}
	dirs := []string{n.BinDir}
	if n.CommandDir != "" {
		dirs = append(dirs, n.CommandDir)
	}
	if n.Unit != nil {
		dirs = append(dirs, n.Unit.Dir, filepath.Dir(n.Unit.wanted()), n.Unit.PolicyDir)
	}
	steps := n.directories(dirs)
	// Before the binaries: a plugin that does not fit what is pinned would fail
	// every ADD.
	steps = append(steps, step{"set up the pinned state in " + n.Pins.Layout.Dir(), n.pin})
	binaries, err := n.binaries()
	if err != nil {
		return nil, err
	}
	steps = append(steps, binaries...)
	if n.Unit != nil {
		unit, err := n.unit()
		if err != nil {
			return nil, err
		}
		steps = append(steps, unit...)
	}
	return append(steps, merge...), nil
}

// directories makes those that are not there, with their parents.
func (n *node) directories(dirs []string) (steps []step) {
	var missing []string
	for _, dir := range dirs {
		var way []string
		for ; dir != "/" && dir != "."; dir = filepath.Dir(dir) {
			if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
				break
			}
			way = append(way, dir)
		}
		for _, dir := range slices.Backward(way) {
			if !slices.Contains(missing, dir) {
				missing = append(missing, dir)
			}
		}
	}
	for _, dir := range missing {
		steps = append(steps, step{"make directory " + dir, func(context.Context) error {
			if err := n.note(Record{Did: KindDir, Path: dir, Undo: "remove it if it is empty"}); err != nil {
				return err
			}
			if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
				return err
			}
			n.point("made " + dir)
			return syncDir(filepath.Dir(dir))
		}})
	}
	return steps
}

func (n *node) binaries() (steps []step, err error) {
	for _, b := range []struct{ name, dir string }{{pluginName, n.BinDir}, {commandName, n.CommandDir}} {
		if b.dir == "" {
			continue
		}
		data, err := os.ReadFile(filepath.Join(n.Source, b.name))
		if err != nil {
			return nil, fmt.Errorf("binary to install: %w", err)
		}
		s, err := n.file(filepath.Join(b.dir, b.name), data, 0o755)
		if err != nil {
			return nil, err
		}
		steps = append(steps, s...)
		if b.name != pluginName {
			continue
		}
		if s, err = n.link(pluginName, filepath.Join(b.dir, ipamName)); err != nil {
			return nil, err
		}
		steps = append(steps, s...)
	}
	return steps, nil
}

// file places a file. One that is there and says the same stays, and is not
// podgate's to remove unless podgate placed it.
func (n *node) file(path string, data []byte, mode fs.FileMode) ([]step, error) {
	if same, err := holds(path, data, mode); err != nil || same {
		return nil, err
	}
	if info, err := os.Stat(path); err == nil && !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s: %w: it is no file", path, ErrInTheWay)
	}
	return []step{{"place " + path, func(context.Context) error {
		r := Record{Did: KindFile, Path: path, SHA256: digest(data), Undo: "remove it"}
		if err := n.keep(&r); err != nil {
			return err
		}
		if err := n.note(r); err != nil {
			return err
		}
		return n.replace(path, data, mode)
	}}}, nil
}

func (n *node) link(target, path string) ([]step, error) {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return nil, err
	case info.Mode()&fs.ModeSymlink != 0:
		if got, err := os.Readlink(path); err != nil || got == target {
			return nil, err
		}
	case !info.Mode().IsRegular():
		return nil, fmt.Errorf("%s: %w: it is no file", path, ErrInTheWay)
	}
	return []step{{"link " + path + " to " + target, func(context.Context) error {
		r := Record{Did: KindLink, Path: path, Target: target, Undo: "remove it"}
		if err := n.keep(&r); err != nil {
			return err
		}
		if err := n.note(r); err != nil {
			return err
		}
		return n.symlink(target, path)
	}}}, nil
}

// keep copies what is at a path before it is changed for the first time.
func (n *node) keep(r *Record) error {
	if first, _, ok := n.changes.find(r.Did, r.Path); ok {
		r.Was = first.Was
	} else if _, err := os.Lstat(r.Path); errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	} else {
		r.Was = n.backup(r.Path)
		if err := n.copyTo(r.Path, r.Was); err != nil {
			return err
		}
	}
	if r.Was != "" && (r.Did == KindFile || r.Did == KindLink) {
		r.Undo = "put " + r.Was + " back"
	}
	return nil
}

// backup is where the copy of a file is kept.
func (n *node) backup(path string) string {
	return filepath.Join(n.StateDir, backupDir, url.PathEscape(path))
}

const backupDir = "backup"

func (n *node) copyTo(from, to string) error {
	if err := os.Mkdir(filepath.Dir(to), 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	info, err := os.Lstat(from)
	if err != nil {
		return err
	}
	if info.Mode()&fs.ModeSymlink != 0 {
		target, err := os.Readlink(from)
		if err != nil {
			return err
		}
		return n.symlink(target, to)
	}
	data, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return n.replace(to, data, info.Mode().Perm())
}

func (n *node) pin(ctx context.Context) error {
	dir := n.Pins.Layout.Dir()
	if _, _, ok := n.changes.find(KindPins, dir); !ok {
		if err := n.note(Record{Did: KindPins, Path: dir, Undo: "take podgate off every interface and remove it"}); err != nil {
			return err
		}
	}
	if err := n.ensure(ctx, n.Pins); err != nil {
		return err
	}
	n.point("pinned " + dir)
	return nil
}

func ensure(ctx context.Context, o pinning.Options) error {
	state, err := pinning.Ensure(ctx, o)
	if err != nil {
		return err
	}
	return state.Close()
}

func unpin(ctx context.Context, o pinning.Options) error {
	_, err := pinning.Uninstall(ctx, o)
	return err
}

// merge puts the entry into the file that the runtime takes, and says which that
// is.
func (n *node) merge() (f conflist.File, steps []step, err error) {
	if n.Conflist != "" {
		f, err = conflist.Load(n.Conflist)
	} else {
		f, err = conflist.Pick(n.ConfDir)
	}
	if err != nil {
		return f, nil, err
	}
	for _, s := range f.Skipped {
		n.Logger.Warn("runtimes may take no network at all because of a file that cannot be loaded", "error", s)
	}
	if info, err := os.Lstat(f.Path); err != nil {
		return f, nil, err
	} else if info.Mode()&fs.ModeSymlink != 0 && f.Form != conflist.FormSingle {
		if f.Path, err = filepath.EvalSymlinks(f.Path); err != nil {
			return f, nil, err
		}
	}
	before, err := os.ReadFile(f.Path)
	if err != nil {
		return f, nil, err
	}
	options, err := n.entry()
	if err != nil {
		return f, nil, err
	}
	after, err := f.Merge(before, conflist.Entry{Options: options})
	if err != nil {
		return f, nil, fmt.Errorf("%s: %w", f.Path, err)
	}
	if f.Form == conflist.FormSingle {
		steps, err = n.convert(f, options)
		return f, steps, err
	}
	if string(after) == string(before) {
		return f, nil, nil
	}
	ours, err := f.Merged(before)
	if err != nil {
		return f, nil, fmt.Errorf("%s: %w", f.Path, err)
	}
	_, _, merged := n.changes.find(KindMerge, f.Path)
	_, _, converted := n.changes.find(KindConvert, f.Path)
	if ours && !merged && !converted {
		return f, nil, fmt.Errorf("%s: %w: it has an entry of podgate-cni that was not put there by podgate install; change it, or take it out",
			f.Path, ErrInTheWay)
	}
	return f, []step{{"put podgate-cni into " + f.Path, func(context.Context) error {
		if !merged && !converted {
			r := Record{Did: KindMerge, Path: f.Path, Form: f.Form, Undo: "take podgate-cni out of it"}
			if err := n.keep(&r); err != nil {
				return err
			}
			if err := n.note(r); err != nil {
				return err
			}
		}
		// Again, since its owner may have written it meanwhile.
		before, err := os.ReadFile(f.Path)
		if err != nil {
			return err
		}
		after, err := f.Merge(before, conflist.Entry{Options: options})
		if err != nil {
			return err
		}
		return n.replace(f.Path, after, 0)
	}}}, nil
}

// entry is the keys of podgate-cni's object: those asked for, and where the
// pinned state is, unless it is where podgate-cni looks anyway.
func (n *node) entry() (json.RawMessage, error) {
	keys := map[string]json.RawMessage{}
	asked := conf.Defaults()
	if len(n.Entry) > 0 {
		var err error
		if asked, err = conf.Parse(n.Entry); err != nil {
			return nil, fmt.Errorf("options: %w", err)
		}
		if err := json.Unmarshal(n.Entry, &keys); err != nil {
			return nil, fmt.Errorf("options: %w", err)
		}
	}
	for key, value := range map[string]struct{ got, want string }{
		"bpffs":    {asked.BPFFS, n.Pins.Layout.BPFFS},
		"instance": {asked.Instance.Instance, n.Pins.Layout.Name},
	} {
		if value.got == value.want {
			continue
		}
		if _, ok := keys[key]; ok {
			return nil, fmt.Errorf("options: %w: %s: %q is not where the pinned state is to be, %q", conf.ErrInvalid, key, value.got, value.want)
		}
		text, err := json.Marshal(value.want)
		if err != nil {
			return nil, err
		}
		keys[key] = text
	}
	if len(keys) == 0 {
		return nil, nil
	}
	return json.Marshal(keys)
}

// convert writes a list beside the file of a single plugin, and then moves that
// aside: runtimes find one of them at any time.
func (n *node) convert(f conflist.File, options json.RawMessage) ([]step, error) {
	path := f.ListPath()
	_, _, known := n.changes.find(KindConvert, path)
	if _, err := os.Lstat(path); err == nil && !known {
		return nil, fmt.Errorf("%s: %w of the list that %s has to become", path, ErrInTheWay, f.Path)
	}
	aside := f.Path + ".podgate-saved"
	return []step{{"turn " + f.Path + " into " + path + ", with podgate-cni", func(context.Context) error {
		if !known {
			r := Record{Did: KindConvert, Path: path, From: f.Path, Was: aside, Undo: "move " + aside + " back and remove the list"}
			if err := n.note(r); err != nil {
				return err
			}
		}
		made, err := n.list(f, f.Path, path, options)
		if err != nil {
			return err
		}
		if err := n.move(f.Path, aside); err != nil {
			return err
		}
		// Its owner may have written it until it was moved.
		if moved, err := os.ReadFile(aside); err != nil || bytes.Equal(moved, made) {
			return err
		}
		_, err = n.list(f, aside, path, options)
		return err
	}}}, nil
}

// list makes a list of the single plugin in the file from, and returns what
// that says.
func (n *node) list(f conflist.File, from, path string, options json.RawMessage) (single []byte, err error) {
	info, err := os.Stat(from)
	if err != nil {
		return nil, err
	}
	if single, err = os.ReadFile(from); err != nil {
		return nil, err
	}
	list, err := f.Merge(single, conflist.Entry{Options: options})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", from, err)
	}
	return single, n.replace(path, list, info.Mode().Perm())
}
