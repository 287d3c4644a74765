// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package install

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/containernetworking/cni/libcni"
	"golang.org/x/sys/unix"

	"github.com/podgate/podgate/install/conflist"
)

// attachment is a file of libcni's cache: how a container was attached, with
// the whole list of then. Runtimes such as CRI-O and podman hand that to DEL,
// which would look for podgate-cni when it is gone.
type attachment struct {
	Kind   string `json:"kind"`
	Config []byte `json:"config"`
}

// forgetAttachments takes podgate-cni out of the lists in libcni's cache and
// returns the files that still name a plugin of podgate's: those of podgate-ipam,
// which is part of another plugin's object, and those of multus, which has a
// cache of its own.
func (n *node) forgetAttachments() (users []string, err error) {
	if err := removeIfThere(n.exchanged()); err != nil {
		return nil, err
	}
	dir := filepath.Join(n.CacheDir, "results")
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("cache of libcni: %w", err)
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		b, err := os.ReadFile(path)
		if err != nil {
			continue // A directory, or of a container that has gone meanwhile.
		}
		changed, uses := withoutEntry(b)
		if changed != nil {
			err := n.exchange(path, changed)
			// A file system that cannot exchange: the plugin has to stay.
			if errors.Is(err, unix.EINVAL) || errors.Is(err, errors.ErrUnsupported) {
				n.Logger.Warn("cache of libcni stays as it is", "error", err)
				uses, err = true, nil
			}
			if err != nil {
				return nil, err
			}
		}
		if uses {
			users = append(users, path)
		}
	}
	of, err := multusUsers(filepath.Join(n.CacheDir, "multus"))
	return append(users, of...), err
}

// withoutEntry is a file of the cache without podgate-cni, nil if it is not in
// there. uses tells that what is left names a plugin of podgate's.
func withoutEntry(b []byte) (changed []byte, uses bool) {
	var a attachment
	if json.Unmarshal(b, &a) != nil || a.Kind != libcni.CNICacheV1 {
		return nil, false
	}
	if merged, err := conflist.Merged(a.Config); err != nil || !merged {
		return nil, namesPlugin(a.Config)
	}
	without, err := conflist.Unmerge(a.Config)
	if err != nil {
		return nil, true
	}
	var all map[string]json.RawMessage
	if json.Unmarshal(b, &all) != nil {
		return nil, true
	}
	if all["config"], err = json.Marshal(without); err != nil {
		return nil, true
	}
	if changed, err = json.Marshal(all); err != nil {
		return nil, true
	}
	// encoding/json, and so libcni, takes keys in any case.
	if json.Unmarshal(changed, &a) != nil || !bytes.Equal(a.Config, without) {
		return nil, true
	}
	return changed, namesPlugin(without)
}

// exchanged is where a file of the cache is built: not beside the others, since
// whatever is there is an attachment.
func (n *node) exchanged() string { return filepath.Join(n.CacheDir, ".podgate-new") }

// exchange replaces a file of the cache, unless it is gone: its container's DEL
// may come at any time, and a file put back would never be removed.
func (n *node) exchange(path string, data []byte) error {
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	building := n.exchanged()
	n.point("write " + building)
	if err := write(building, data, info.Mode().Perm(), info); err != nil {
		return errors.Join(err, removeIfThere(building))
	}
	n.point("exchange " + path)
	err = unix.Renameat2(unix.AT_FDCWD, building, unix.AT_FDCWD, path, unix.RENAME_EXCHANGE)
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	if err != nil {
		err = fmt.Errorf("exchange %s: %w", path, err)
	}
	n.point("exchanged " + path)
	return errors.Join(err, removeIfThere(building))
}

// multusUsers are the containers that multus has attached with podgate-cni.
func multusUsers(dir string) (users []string, err error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("cache of multus: %w", err)
	}
	for _, e := range entries {
		b, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			continue
		}
		var delegates []struct{ Bytes []byte }
		if json.Unmarshal(b, &delegates) != nil {
			continue
		}
		for _, d := range delegates {
			if namesPlugin(d.Bytes) {
				users = append(users, filepath.Join(dir, e.Name()))
				break
			}
		}
	}
	return users, nil
}

// pluginUsers are the configurations of a directory, and of folders in it, that
// name a plugin of podgate's.
func pluginUsers(dir string) (users []string, err error) {
	err = filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		switch filepath.Ext(path) {
		case ".conf", ".conflist", ".json":
		default:
			return nil
		}
		if !e.IsDir() {
			if b, err := os.ReadFile(path); err == nil && namesPlugin(b) {
				users = append(users, path)
			}
		}
		return nil
	})
	return users, err
}

// namesPlugin tells whether a configuration calls a plugin of podgate's. A name
// that is written otherwise than people write it is not found.
func namesPlugin(config []byte) bool {
	return bytes.Contains(config, []byte(`"`+pluginName+`"`)) || bytes.Contains(config, []byte(`"`+ipamName+`"`))
}
