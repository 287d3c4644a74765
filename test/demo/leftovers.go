// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/cilium/ebpf"
)

// leftovers remembers what a lab made on the machine, to look for it later.
type leftovers struct {
	maps     []ebpf.MapID
	programs []ebpf.ProgramID
	paths    []string
}

// record notes every map and program pinned on the lab's node, and every path.
func record(l *lab) (*leftovers, error) {
	r := &leftovers{paths: []string{l.node.Dir, l.node.NetNS()}}
	for _, p := range l.pods {
		r.paths = append(r.paths, p.NetNS())
	}
	err := filepath.WalkDir(l.node.BPFFS+"/.", func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil || d.IsDir():
			return err
		case strings.Contains(path, "/maps/"):
			return r.noteMap(path)
		case strings.Contains(path, "/progs/"):
			return r.noteProgram(path)
		}
		return nil
	})
	if err == nil && (len(r.maps) == 0 || len(r.programs) == 0) {
		err = errors.New("found no pinned maps and programs to look for")
	}
	return r, err
}

func (r *leftovers) noteMap(path string) error {
	m, err := ebpf.LoadPinnedMap(path, nil)
	if err != nil {
		return err
	}
	defer m.Close()
	info, err := m.Info()
	if err != nil {
		return err
	}
	id, _ := info.ID()
	r.maps = append(r.maps, id)
	return nil
}

func (r *leftovers) noteProgram(path string) error {
	p, err := ebpf.LoadPinnedProgram(path, nil)
	if err != nil {
		return err
	}
	defer p.Close()
	info, err := p.Info()
	if err != nil {
		return err
	}
	id, _ := info.ID()
	r.programs = append(r.programs, id)
	return nil
}

// check fails when something is still there. The kernel frees maps and programs
// a moment after their last user is gone.
func (r *leftovers) check() error {
	var left []string
	for deadline := time.Now().Add(10 * time.Second); ; {
		left = r.present()
		if len(left) == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("still there: %s", strings.Join(left, ", "))
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func (r *leftovers) present() []string {
	var left []string
	for _, id := range r.maps {
		if m, err := ebpf.NewMapFromID(id); !errors.Is(err, os.ErrNotExist) {
			left = append(left, fmt.Sprintf("map %d", id))
			m.Close()
		}
	}
	for _, id := range r.programs {
		if p, err := ebpf.NewProgramFromID(id); !errors.Is(err, os.ErrNotExist) {
			left = append(left, fmt.Sprintf("program %d", id))
			p.Close()
		}
	}
	for _, path := range r.paths {
		if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
			left = append(left, path)
		}
	}
	return left
}
