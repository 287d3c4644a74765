// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package status

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"testing"
	"time"

	"github.com/podgate/podgate/syncd/source"
)

func TestStatus(t *testing.T) {
	path := filepath.Join(t.TempDir(), "podgate", "x")
	if _, running, err := Read(path); running || !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("before: running %v, error %v", running, err)
	}
	dir, err := Acquire(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, running, err := Read(path); !running || !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("before the first write: running %v, error %v", running, err)
	}
	if _, err := Acquire(path); !errors.Is(err, ErrRunning) {
		t.Errorf("second daemon: %v", err)
	}
	want := Status{
		PID: 1, Version: "v", Started: time.Unix(1, 0).UTC(), Origin: Origin{PolicyDir: "/p"}, Pods: 2,
		Problems: []source.Problem{{Subject: "/p/a.yaml", Reason: "broken", Since: time.Unix(2, 0).UTC()}},
	}
	if err := dir.Write(want); err != nil {
		t.Fatal(err)
	}
	got, running, err := Read(path)
	if err != nil || !running || !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, running %v, error %v", got, running, err)
	}
	if err := dir.Close(); err != nil {
		t.Fatal(err)
	}
	if _, running, err := Read(path); running || err != nil {
		t.Errorf("after: running %v, error %v", running, err)
	}
	if dir, err = Acquire(path); err != nil {
		t.Fatalf("next daemon: %v", err)
	}
	defer dir.Close()
}

func TestReadDamaged(t *testing.T) {
	path := t.TempDir()
	if err := os.WriteFile(filepath.Join(path, statusName), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := Read(path); err == nil {
		t.Error("no error")
	}
}
