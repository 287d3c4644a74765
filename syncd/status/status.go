// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

// Package status lets the sync daemon say how it is, to whoever asks later.
//
// A run directory belongs to one instance of podgate. It holds a lock, which
// the daemon keeps for as long as it lives and which therefore tells whether
// it does, and a JSON file, replaced as a whole.
package status

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/google/renameio/v2"
	"golang.org/x/sys/unix"

	"github.com/podgate/podgate/syncd/source"
)

// ErrRunning says that another daemon holds the run directory.
var ErrRunning = errors.New("another podgate sync is running")

// Status is how a daemon is.
type Status struct {
	PID     int       `json:"pid"`
	Version string    `json:"version"`
	Started time.Time `json:"started"`
	// Updated is when the daemon last wrote this; it does so at least once in
	// [Interval] while it is well.
	Updated time.Time `json:"updated"`
	Origin
	// Once says that the process was to apply the state and end.
	Once bool `json:"once,omitempty"`
	// Synced is when the kernel last had everything the daemon knew; zero if it
	// never did.
	Synced time.Time `json:"synced,omitzero"`
	// Applied is when an update last came into force, be it less what found no
	// room; zero if none did.
	Applied time.Time `json:"applied,omitzero"`

	Policies   int `json:"policies"`
	Pods       int `json:"pods"`
	Namespaces int `json:"namespaces"`
	Endpoints  int `json:"endpoints"`

	Problems []source.Problem `json:"problems"`
}

// Origin is where a daemon's policy comes from: PolicyDir or Kubeconfig.
type Origin struct {
	// Node is the node's name in spec.nodeName.
	Node string `json:"node,omitempty"`
	// PolicyDir is an absolute path.
	PolicyDir string `json:"policyDir,omitempty"`
	// Kubeconfig is an absolute path or "in-cluster", APIServer the URL of the
	// server it names.
	Kubeconfig string `json:"kubeconfig,omitempty"`
	APIServer  string `json:"apiServer,omitempty"`
	// AuditPods says that pods may ask for audit mode themselves.
	AuditPods bool `json:"auditPods,omitempty"`
}

// Interval is how often a daemon that is well writes its status.
const Interval = 30 * time.Second

// Dir is a run directory held by this process.
type Dir struct {
	path string
	lock *os.File
}

const (
	lockName   = "lock"
	statusName = "status.json"
)

// Acquire makes the run directory if need be and holds it. It fails with
// [ErrRunning] while another process does.
func Acquire(path string) (*Dir, error) {
	if err := os.MkdirAll(path, 0o755); err != nil {
		return nil, fmt.Errorf("run directory: %w", err)
	}
	lock, err := os.OpenFile(filepath.Join(path, lockName), os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, fmt.Errorf("run directory: %w", err)
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		lock.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("%w: it holds %s", ErrRunning, path)
		}
		return nil, fmt.Errorf("lock run directory %s: %w", path, err)
	}
	return &Dir{path: path, lock: lock}, nil
}

// Path of the directory.
func (d *Dir) Path() string { return d.path }

// Write replaces the status.
func (d *Dir) Write(s Status) error {
	data, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	return renameio.WriteFile(filepath.Join(d.path, statusName), append(data, '\n'), 0o644)
}

// Close lets go of the directory; the status stays.
func (d *Dir) Close() error { return d.lock.Close() }

// Read reads the last status of a run directory and tells whether the daemon
// that wrote it is running. With no status ever written it fails with
// [fs.ErrNotExist].
func Read(path string) (s Status, running bool, err error) {
	running, err = held(filepath.Join(path, lockName))
	if err != nil {
		return Status{}, false, err
	}
	data, err := os.ReadFile(filepath.Join(path, statusName))
	if err != nil {
		return Status{}, running, err
	}
	if err := json.Unmarshal(data, &s); err != nil {
		return Status{}, running, fmt.Errorf("%s: %w", filepath.Join(path, statusName), err)
	}
	return s, running, nil
}

// held tells whether a process holds the lock.
func held(path string) (bool, error) {
	lock, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer lock.Close()
	err = unix.Flock(int(lock.Fd()), unix.LOCK_SH|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return true, nil
	}
	return false, err
}
