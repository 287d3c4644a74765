// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package install

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// temporary is the name under which what goes to path is built. It is always the
// same, so that what a dead process left is overwritten and can be removed, and
// it ends in nothing that a runtime would load.
func temporary(path string) string {
	return filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".podgate-new")
}

// replace writes a file as a whole: readers see the old one or the new one, also
// after a power failure. It keeps the owner of a file that is there, and its
// mode if mode is 0.
//
// renameio gives a temporary file another name each time, which a process that
// is killed leaves behind for ever.
func (n *node) replace(path string, data []byte, mode fs.FileMode) error {
	old, err := os.Stat(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if mode == 0 {
		mode = 0o644
		if old != nil {
			mode = old.Mode().Perm()
		}
	}
	building := temporary(path)
	n.point("write " + building)
	if err := write(building, data, mode, old); err != nil {
		// What was not written to the end takes room that is wanted.
		return errors.Join(fmt.Errorf("write %s: %w", path, err), removeIfThere(building))
	}
	n.point("rename to " + path)
	if err := os.Rename(building, path); err != nil {
		return errors.Join(err, removeIfThere(building))
	}
	n.point("renamed to " + path)
	return syncDir(filepath.Dir(path))
}

func write(path string, data []byte, mode fs.FileMode, like fs.FileInfo) error {
	if err := removeIfThere(path); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil && like != nil {
		if st, ok := like.Sys().(*syscall.Stat_t); ok {
			err = f.Chown(int(st.Uid), int(st.Gid))
		}
	}
	if err == nil {
		err = f.Chmod(mode)
	}
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// symlink makes or replaces a symbolic link.
func (n *node) symlink(target, path string) error {
	building := temporary(path)
	if err := removeIfThere(building); err != nil {
		return err
	}
	n.point("link " + building)
	if err := os.Symlink(target, building); err != nil {
		return err
	}
	n.point("rename to " + path)
	if err := os.Rename(building, path); err != nil {
		return errors.Join(err, removeIfThere(building))
	}
	n.point("renamed to " + path)
	return syncDir(filepath.Dir(path))
}

// move renames from to to, if from is there.
func (n *node) move(from, to string) error {
	n.point("move " + from)
	if err := os.Rename(from, to); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	n.point("moved " + from)
	return syncDir(filepath.Dir(to))
}

// remove removes a file, and what is left of a file that was to become it.
func (n *node) remove(path string) error {
	n.point("remove " + path)
	if err := errors.Join(removeIfThere(temporary(path)), removeIfThere(path)); err != nil {
		return err
	}
	n.point("removed " + path)
	if err := syncDir(filepath.Dir(path)); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// removeIfThere looks first: a file system that is read-only says so even where
// there is nothing to remove.
func removeIfThere(path string) error {
	if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		return nil
	}
	return os.Remove(path)
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func digest(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

// holds tells whether a file has this content and these permissions.
func holds(path string, data []byte, mode fs.FileMode) (bool, error) {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if !info.Mode().IsRegular() || info.Size() != int64(len(data)) || info.Mode().Perm() != mode {
		return false, nil
	}
	got, err := os.ReadFile(path)
	return err == nil && bytes.Equal(got, data), err
}
