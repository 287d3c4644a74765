// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package cluster

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// cgroupPrefix and the PID of who started a cluster name the cluster's cgroup in
// each hierarchy.
const cgroupPrefix = "podgate-e2e-"

// hierarchies of cgroup v1, or the one of v2.
func hierarchies() []string {
	const root = "/sys/fs/cgroup"
	if _, err := os.Stat(filepath.Join(root, "cgroup.controllers")); err == nil {
		return []string{root}
	}
	paths, _ := filepath.Glob(root + "/*") // the pattern is well-formed
	return paths
}

// removeCgroups removes what PID 1 of nodes and their kubelets made. Processes
// that were killed leave their cgroups a little later.
func removeCgroups(name string) error {
	deadline := time.Now().Add(10 * time.Second)
	for {
		var errs []error
		for _, h := range hierarchies() {
			errs = append(errs, removeTree(filepath.Join(h, name)))
		}
		err := errors.Join(errs...)
		if err == nil || time.Now().After(deadline) {
			return err
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// removeTree removes a cgroup and all below it.
func removeTree(root string) error {
	var dirs []string
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs = append(dirs, path)
		}
		return err
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for i := len(dirs) - 1; i >= 0; i-- { // children follow their parents
		if err := os.Remove(dirs[i]); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("cgroup: %w", err)
		}
	}
	return nil
}

// sweepCgroups removes what clusters left whose process was killed. What cannot
// be removed is somebody's.
func sweepCgroups() {
	for _, h := range hierarchies() {
		left, _ := filepath.Glob(filepath.Join(h, cgroupPrefix+"*")) // the pattern is well-formed
		for _, dir := range left {
			pid, err := strconv.Atoi(strings.TrimPrefix(filepath.Base(dir), cgroupPrefix))
			if err != nil {
				continue
			}
			if _, err := os.Stat(fmt.Sprintf("/proc/%d", pid)); errors.Is(err, fs.ErrNotExist) {
				_ = removeTree(dir)
			}
		}
	}
}
