// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package source

import (
	"crypto/sha256"
	"encoding/hex"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/google/renameio/v2"
)

// cache keeps the last good version of files across restarts of the process.
// The zero cache keeps nothing.
type cache struct {
	dir      string
	readOnly bool
}

// newCache is the part of the cache at base that belongs to one directory, so
// that two directories that take turns do not mix.
func newCache(base, directory string, readOnly bool) cache {
	if abs, err := filepath.Abs(directory); err == nil {
		directory = abs
	}
	sum := sha256.Sum256([]byte(directory))
	return cache{filepath.Join(base, hex.EncodeToString(sum[:8])), readOnly}
}

// store replaces the version of a file.
func (c cache) store(name string, data []byte) error {
	if c.dir == "" || c.readOnly {
		return nil
	}
	if err := os.MkdirAll(c.dir, 0o700); err != nil {
		return err
	}
	return renameio.WriteFile(filepath.Join(c.dir, name), data, 0o600)
}

// load reads the version of a file, or fails with [fs.ErrNotExist].
func (c cache) load(name string) ([]byte, error) {
	if c.dir == "" {
		return nil, fs.ErrNotExist
	}
	return os.ReadFile(filepath.Join(c.dir, name))
}

func (c cache) remove(name string) error {
	if c.dir == "" || c.readOnly {
		return nil
	}
	return os.Remove(filepath.Join(c.dir, name))
}

// prune removes the versions of files other than the named ones. What cannot
// be removed does no harm before a broken file has its name.
func (c cache) prune(names []string) {
	if c.dir == "" || c.readOnly {
		return
	}
	entries, err := os.ReadDir(c.dir)
	if err != nil {
		return
	}
	for _, e := range entries {
		if !slices.Contains(names, e.Name()) {
			_ = c.remove(e.Name())
		}
	}
}
