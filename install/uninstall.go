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
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podgate/podgate/install/conflist"
	"github.com/podgate/podgate/pinning"
)

// Uninstall undoes what the log says: the configuration of the runtime first, so
// that nobody calls podgate any more, then the gates, at last the binaries.
// Pods that run keep their connections. It returns what it left, because others
// have changed it or still need it, each as a sentence; the log then has the
// rest, and Uninstall may be called again.
func Uninstall(ctx context.Context, o Options) (left []string, err error) {
	n, done, err := begin(ctx, o)
	if err != nil {
		return nil, err
	}
	defer done()
	u := &removal{node: n}
	steps, err := u.steps()
	if err != nil {
		return nil, err
	}
	err = n.run(ctx, steps)
	return u.left, err
}

// removal is one call of Uninstall.
type removal struct {
	*node
	// left are sentences about what stays, and keep the records of it.
	left []string
	keep []Record
	// changed tells that a runtime has something to read again.
	changed bool
}

func (u *removal) leave(r Record, why string) {
	u.left = append(u.left, r.Path+" "+why)
	u.keep = append(u.keep, r)
}

func (u *removal) steps() (steps []step, err error) {
	add := func(what string, do func(context.Context) error) { steps = append(steps, step{what, do}) }
	if err := u.stopped(); err != nil {
		return nil, err
	}
	merged := u.changes.of(KindMerge, KindConvert)
	for _, r := range slices.Backward(merged) {
		add("take podgate-cni out of "+r.Path, func(context.Context) error { return u.unmerge(r) })
	}
	for _, r := range u.changes.of(KindUnit) {
		add("stop "+r.Path, func(ctx context.Context) error { return u.stop(ctx, r) })
	}
	if len(merged) > 0 {
		add(fmt.Sprintf("give runtimes %s to read what changed", u.Settle), u.settle)
	}
	for _, r := range u.changes.of(KindPins) {
		add("take podgate off every interface, and remove "+r.Path, func(ctx context.Context) error { return u.unpin(ctx, r) })
	}
	if len(u.changes.records) > 0 {
		add("take podgate-cni out of what runtimes keep in "+u.CacheDir, u.forget)
	}
	for _, r := range slices.Backward(u.changes.of(KindFile, KindLink)) {
		add("remove "+r.Path, func(ctx context.Context) error { return u.unplace(ctx, r) })
	}
	for _, r := range slices.Backward(u.changes.of(KindDir)) {
		add("remove "+r.Path+", if it is empty", func(context.Context) error { return u.rmdir(r.Path) })
	}
	add("remove "+u.StateDir, func(context.Context) error { return u.finish() })
	return steps, nil
}

// stopped fails if somebody would put back what is taken off: a watcher, or a
// daemon that no record says how to stop.
func (u *removal) stopped() error {
	if yes, err := watched(u.StateDir); err != nil {
		return err
	} else if yes {
		return fmt.Errorf("%w: stop it first", ErrWatched)
	}
	if len(u.changes.of(KindUnit)) > 0 && u.Unit != nil {
		return nil
	}
	running, err := u.Daemon()
	if err == nil && running && len(u.changes.of(KindPins)) > 0 {
		err = fmt.Errorf("%w: stop it first", ErrRunning)
	}
	return err
}

func (u *removal) unmerge(r Record) error {
	if r.Did == KindConvert {
		if err := u.unconvert(r); err != nil {
			return err
		}
	}
	b, err := os.ReadFile(r.Path)
	if errors.Is(err, fs.ErrNotExist) {
		return removeIfThere(temporary(r.Path))
	}
	if err != nil {
		return err
	}
	without, err := conflist.File{Form: r.Form}.Unmerge(b)
	if errors.Is(err, conflist.ErrList) && !namesPlugin(b) {
		// Its owner has made something else of it.
		without, err = b, nil
	}
	if err != nil {
		return err
	}
	if string(without) == string(b) {
		return removeIfThere(temporary(r.Path))
	}
	u.changed = true
	return u.replace(r.Path, without, 0)
}

// unconvert moves the file of the single plugin back, which runtimes take
// before the list, unless somebody has written it anew, and removes the list
// unless somebody has changed that.
func (u *removal) unconvert(r Record) error {
	single, err := os.ReadFile(r.Was)
	if errors.Is(err, fs.ErrNotExist) {
		if single, err = os.ReadFile(r.From); err != nil {
			return nil // Nobody wants it any more, or the list is all there is.
		}
	} else if err != nil {
		return err
	}
	list, err := os.ReadFile(r.Path)
	if errors.Is(err, fs.ErrNotExist) {
		return u.restored(r)
	}
	if err != nil {
		return err
	}
	u.changed = true
	without, err := conflist.Unmerge(list)
	if err != nil {
		return err
	}
	want, err := conflist.FromSingle(single)
	if err != nil || string(without) != string(want) {
		u.leave(r, "was changed since podgate made it of "+r.From+", and stays without podgate-cni")
		return nil
	}
	if _, err := os.Lstat(r.From); errors.Is(err, fs.ErrNotExist) {
		if err := u.move(r.Was, r.From); err != nil {
			return err
		}
	}
	if err := u.remove(r.Path); err != nil {
		return err
	}
	return u.restored(r)
}

// restored removes the copy of a file that is there again.
func (u *removal) restored(r Record) error {
	if _, err := os.Lstat(r.From); err != nil {
		return nil
	}
	return u.remove(r.Was)
}

func (u *removal) stop(ctx context.Context, r Record) error {
	if u.Unit == nil {
		u.leave(r, "stays: this call is to leave systemd alone")
		return nil
	}
	if _, err := os.Lstat(u.Unit.path()); err == nil {
		if err := u.Unit.Systemctl(ctx, "stop", r.Path); err != nil {
			return err
		}
		u.point("stopped " + r.Path)
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	// The files of a unit go before systemd forgets it.
	for _, f := range slices.Backward(u.changes.of(KindFile, KindLink)) {
		if f.Path == u.Unit.path() || f.Path == u.Unit.wanted() {
			if err := u.unplace(ctx, f); err != nil {
				return err
			}
		}
	}
	return u.Unit.Systemctl(ctx, "daemon-reload")
}

func (u *removal) settle(ctx context.Context) error {
	if !u.changed {
		return nil
	}
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(u.Settle):
		return nil
	}
}

func (u *removal) unpin(ctx context.Context, r Record) error {
	if running, err := u.Daemon(); err != nil {
		return err
	} else if running {
		return fmt.Errorf("%w: stop it", ErrRunning)
	}
	pins := u.Pins
	pins.Layout = pinning.Layout{BPFFS: filepath.Dir(r.Path), Name: filepath.Base(r.Path)}
	u.point("unpin " + r.Path)
	if err := u.unpins(ctx, pins); err != nil {
		return err
	}
	u.point("unpinned " + r.Path)
	if err := os.RemoveAll(u.RunDir); err != nil {
		return err
	}
	if parent := filepath.Dir(u.RunDir); filepath.Base(parent) == "podgate" {
		return u.rmdir(parent) // Of all instances.
	}
	return nil
}

// forget changes what runtimes would hand to DEL, and finds out who else still
// calls podgate's plugins.
func (u *removal) forget(context.Context) error {
	users, err := u.forgetAttachments()
	if err != nil {
		return err
	}
	files, err := pluginUsers(u.ConfDir)
	if err != nil {
		return err
	}
	users = append(users, files...)
	if len(users) == 0 {
		return nil
	}
	for _, r := range u.changes.of(KindFile, KindLink) {
		if name := filepath.Base(r.Path); name == pluginName || name == ipamName {
			u.leave(r, fmt.Sprintf("stays: %d files still name it, such as %s", len(users), users[0]))
		}
	}
	return nil
}

func (u *removal) unplace(_ context.Context, r Record) error {
	if slices.ContainsFunc(u.keep, func(k Record) bool { return k.Path == r.Path }) {
		return nil
	}
	if err := removeIfThere(temporary(r.Path)); err != nil {
		return err
	}
	_, digests, _ := u.changes.find(r.Did, r.Path)
	now, err := fingerprint(r.Path)
	if errors.Is(err, fs.ErrNotExist) {
		if r.Was == "" {
			return nil
		}
	} else if err != nil {
		return err
	} else if !slices.Contains(digests, now) {
		if r.Was != "" {
			if was, err := fingerprint(r.Was); err == nil && was == now {
				return nil
			}
		}
		u.leave(r, "stays: somebody has changed it")
		return nil
	}
	if r.Was != "" {
		return u.copyTo(r.Was, r.Path)
	}
	return u.remove(r.Path)
}

// fingerprint is what a record has of a file or link.
func fingerprint(path string) (string, error) {
	info, err := os.Lstat(path)
	if err != nil {
		return "", err
	}
	if info.Mode()&fs.ModeSymlink != 0 {
		return os.Readlink(path)
	}
	data, err := os.ReadFile(path)
	return digest(data), err
}

// rmdir removes a directory that nobody has put anything into.
func (u *removal) rmdir(path string) error {
	u.point("remove " + path)
	entries, err := os.ReadDir(path)
	if errors.Is(err, fs.ErrNotExist) || len(entries) > 0 {
		return nil
	}
	if err != nil {
		return err
	}
	// Then it was not made here, or is mounted into the container of a pod.
	if err := os.Remove(path); !errors.Is(err, unix.EROFS) && !errors.Is(err, unix.EBUSY) {
		return err
	}
	return nil
}

// finish leaves a log of what stays, or none.
func (u *removal) finish() error {
	if len(u.keep) > 0 {
		var b []byte
		for _, r := range u.changes.records {
			kept := func(k Record) bool { return k.Did == r.Did && k.Path == r.Path }
			if !slices.ContainsFunc(u.keep, kept) && r.Did != KindDir {
				continue
			}
			line, err := json.Marshal(r)
			if err != nil {
				return err
			}
			b = append(append(b, line...), '\n')
		}
		return u.replace(u.changes.path, b, 0o600)
	}
	// The log goes first: without it nobody looks for the copies it names.
	for _, path := range []string{u.changes.path, temporary(u.changes.path), filepath.Join(u.StateDir, watchName)} {
		u.point("remove " + path)
		if err := removeIfThere(path); err != nil {
			return err
		}
	}
	backups := filepath.Join(u.StateDir, backupDir)
	u.point("remove " + backups)
	if _, err := os.Lstat(backups); err == nil {
		if err := os.RemoveAll(backups); err != nil {
			return err
		}
	}
	return u.rmdir(u.StateDir)
}
