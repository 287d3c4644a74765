// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package source

import (
	"fmt"
	"maps"
	"reflect"
	"slices"
	"time"

	"github.com/podgate/podgate/syncd/manifest"
)

// difference sums up the files and answers what is new since the last sum. Its
// problems have no dates yet.
func (d *Directory) difference() Batch {
	state, problems := d.merge()
	batch := Batch{Problems: problems}
	for key, o := range state {
		if old, ok := d.state[key]; !ok || !sameContent(old, o) {
			batch.Set = append(batch.Set, o)
		}
	}
	for key := range d.state {
		if _, ok := state[key]; !ok {
			batch.Gone = append(batch.Gone, key)
		}
	}
	slices.SortFunc(batch.Set, func(a, b manifest.Object) int { return a.Compare(b.Key) })
	slices.SortFunc(batch.Gone, manifest.Key.Compare)
	d.state = state
	return batch
}

// merge sums up the files in the order of their names.
func (d *Directory) merge() (map[manifest.Key]manifest.Object, []Problem) {
	state := make(map[manifest.Key]manifest.Object)
	uids := make(map[string]manifest.Object)
	var problems []Problem
	for _, name := range slices.Sorted(maps.Keys(d.files)) {
		f := d.files[name]
		for _, fault := range f.faults {
			problems = append(problems, Problem{Subject: d.path(name), Reason: fault + "; " + f.consequence()})
		}
		for _, o := range f.objects {
			first, twice := state[o.Key]
			if uid := identity(o); !twice && uid != "" {
				if first, twice = uids[uid]; !twice {
					uids[uid] = o
				}
			}
			if twice {
				problems = append(problems, conflict(first, o))
				continue
			}
			state[o.Key] = o
		}
	}
	return state, problems
}

// consequence says what a broken file means for enforcement.
func (f *file) consequence() string {
	if len(f.objects) == 0 {
		return "NOTHING in this file is enforced: there is no earlier good version of it"
	}
	return fmt.Sprintf("its last good version stays in force (%d objects)", len(f.objects))
}

// identity is what a policy or pod goes by in the compiler, whatever its name.
func identity(o manifest.Object) string {
	switch {
	case o.Policy != nil:
		return o.Kind + " " + o.Policy.UID
	case o.Pod != nil:
		return o.Kind + " " + string(o.Pod.Key)
	}
	return ""
}

func conflict(first, second manifest.Object) Problem {
	what := "is defined"
	if first.Key != second.Key {
		what = fmt.Sprintf("has the UID of %v,", first.Key)
	}
	return Problem{
		Subject: second.File,
		Reason: fmt.Sprintf("%s:%d: %v %s already in %s:%d; that one counts",
			second.File, second.Line, second.Key, what, first.File, first.Line),
	}
}

// sameContent compares objects wherever they were read.
func sameContent(a, b manifest.Object) bool {
	a.File, a.Line, a.Document = b.File, b.Line, b.Document
	return reflect.DeepEqual(a, b)
}

// date says of each problem when it was first seen.
func (d *Directory) date(problems []Problem) {
	since := make(map[Problem]time.Time, len(problems))
	for i, p := range problems {
		first, ok := d.since[p]
		if !ok {
			first = time.Now()
		}
		since[p] = first
		problems[i].Since = first
	}
	d.since = since
}
