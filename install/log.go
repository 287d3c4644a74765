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
	"slices"
	"time"

	"github.com/podgate/podgate/install/conflist"
)

// Kind of a change that [Record] is about.
type Kind string

// The kinds of changes, each with what undoes it.
const (
	// KindDir made a directory: removed, if it is empty.
	KindDir Kind = "dir"
	// KindFile placed a file: removed, or what was there put back.
	KindFile Kind = "file"
	// KindLink made a symbolic link: removed, or what was there put back.
	KindLink Kind = "link"
	// KindPins made the pinned state: taken off the interfaces and removed.
	KindPins Kind = "pins"
	// KindUnit started a systemd unit: stopped.
	KindUnit Kind = "unit"
	// KindMerge put podgate's entry into a file: taken out of what the file
	// says by then.
	KindMerge Kind = "merge"
	// KindConvert made a list of the file of a single plugin, which was moved
	// aside: that is moved back and the list removed.
	KindConvert Kind = "convert"
)

// Record is one line of the log: a change that was about to be made.
type Record struct {
	Time    time.Time `json:"time"`
	Version string    `json:"version,omitempty"`
	Did     Kind      `json:"did"`
	// Path of what changed; of [KindPins] the directory of the instance, of
	// [KindUnit] the name of the unit.
	Path string `json:"path"`
	// Was is a copy of what was there before; of [KindConvert] the file that
	// was moved aside. Empty if there was nothing.
	Was string `json:"was,omitempty"`
	// Form of the file of [KindMerge].
	Form conflist.Form `json:"form,omitempty"`
	// From is the file that [KindConvert] started from.
	From string `json:"from,omitempty"`
	// SHA256 of what [KindFile] placed, or the target of [KindLink].
	SHA256 string `json:"sha256,omitempty"`
	Target string `json:"target,omitempty"`
	// Undo says in words what undoes it.
	Undo string `json:"undo"`
}

const logName = "install.jsonl"

// changeLog is the log in a state directory that this process has locked.
type changeLog struct {
	path    string
	records []Record
	// torn is how many bytes at the end are no whole line.
	torn int64
	size int64
}

// readLog reads the log of a state directory; none is an empty one. A last line
// without an end is of a process that died while it wrote, before the change.
func readLog(dir string) (*changeLog, error) {
	l := &changeLog{path: filepath.Join(dir, logName)}
	b, err := os.ReadFile(l.path)
	if errors.Is(err, fs.ErrNotExist) {
		return l, nil
	}
	if err != nil {
		return nil, fmt.Errorf("log: %w", err)
	}
	whole := b[:bytes.LastIndexByte(b, '\n')+1]
	l.size, l.torn = int64(len(b)), int64(len(b)-len(whole))
	for n, line := range bytes.Split(bytes.TrimSuffix(whole, []byte("\n")), []byte("\n")) {
		if len(line) == 0 {
			continue
		}
		var r Record
		if err := json.Unmarshal(line, &r); err != nil {
			return nil, fmt.Errorf("log %s, line %d: %w", l.path, n+1, err)
		}
		l.records = append(l.records, r)
	}
	return l, nil
}

// find is what is on record about a path: the first record, which knows what was
// there before podgate, with the digests and targets of all.
func (l *changeLog) find(kind Kind, path string) (first Record, digests []string, ok bool) {
	for _, r := range l.records {
		if r.Did != kind || r.Path != path {
			continue
		}
		if !ok {
			first, ok = r, true
		}
		digests = append(digests, r.SHA256+r.Target)
	}
	return first, digests, ok
}

// of lists the first records of a kind, in the order in which they were made.
func (l *changeLog) of(kinds ...Kind) (all []Record) {
	for _, r := range l.records {
		known := func(o Record) bool { return o.Did == r.Did && o.Path == r.Path }
		if slices.Contains(kinds, r.Did) && !slices.ContainsFunc(all, known) {
			all = append(all, r)
		}
	}
	return all
}

// add notes a change that is about to be made. It is on disk when add returns.
func (l *changeLog) add(r Record) error {
	line, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("log: %w", err)
	}
	f, err := os.OpenFile(l.path, os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("log: %w", err)
	}
	at := l.size - l.torn
	line = append(line, '\n')
	_, err = f.WriteAt(line, at)
	if err == nil {
		err = f.Truncate(at + int64(len(line)))
	}
	if err = errors.Join(err, f.Sync(), f.Close(), syncDir(filepath.Dir(l.path))); err != nil {
		return fmt.Errorf("log %s: %w", l.path, err)
	}
	l.size, l.torn = at+int64(len(line)), 0
	l.records = append(l.records, r)
	return nil
}
