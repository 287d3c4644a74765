// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package syncd

import (
	"cmp"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"time"

	"github.com/podgate/podgate/syncd/source"
)

// problems are those that stand, by the step they come from. Each is logged
// once, when it appears, and its end as well.
type problems struct {
	log *slog.Logger
	// notify is told each that appears.
	notify   func(source.Problem)
	standing map[string][]source.Problem
}

func newProblems(log *slog.Logger, notify func(source.Problem)) problems {
	return problems{log, notify, make(map[string][]source.Problem)}
}

// set replaces the problems of a step by an error, or by none.
func (p problems) set(step, subject string, err error) {
	if err == nil {
		p.replace(step, nil)
		return
	}
	p.replace(step, []source.Problem{{Subject: subject, Reason: err.Error()}})
}

// most is how many problems of one step stand by themselves. A full map may
// make as many as there are addresses.
const most = 20

// replace replaces the problems of a step. Those without a date get that of
// the same problem before, or the present.
func (p problems) replace(step string, next []source.Problem) {
	next = few(distinct(next))
	before := make(map[fault]source.Problem, len(p.standing[step]))
	for _, o := range p.standing[step] {
		before[fault{o.Subject, o.Reason}] = o
	}
	for i := range next {
		n := &next[i]
		if o, same := before[fault{n.Subject, n.Reason}]; same {
			n.Since = o.Since
			delete(before, fault{n.Subject, n.Reason})
			continue
		}
		if n.Since.IsZero() {
			n.Since = time.Now()
		}
		p.log.Error("problem", "subject", n.Subject, "reason", n.Reason)
		p.notify(*n)
	}
	for _, o := range before {
		p.log.Info("problem solved", "subject", o.Subject, "reason", o.Reason)
	}
	if len(next) == 0 {
		delete(p.standing, step)
		return
	}
	p.standing[step] = next
}

// fault is what makes two problems of a step one.
type fault struct{ subject, reason string }

// distinct is a copy without what two things have alike.
func distinct(all []source.Problem) []source.Problem {
	seen := make(map[fault]struct{}, len(all))
	return slices.DeleteFunc(slices.Clone(all), func(p source.Problem) bool {
		key := fault{p.Subject, p.Reason}
		_, twice := seen[key]
		seen[key] = struct{}{}
		return twice
	})
}

// few changes a list so that it has one problem for all that are too many.
func few(all []source.Problem) []source.Problem {
	if len(all) <= most {
		return all
	}
	slices.SortFunc(all, func(a, b source.Problem) int {
		return cmp.Or(cmp.Compare(a.Subject, b.Subject), cmp.Compare(a.Reason, b.Reason))
	})
	rest := source.Problem{Subject: all[most].Subject, Reason: fmt.Sprintf("and %d more problems like these", len(all)-most)}
	return append(all[:most:most], rest)
}

// list answers all problems in a stable order; never nil.
func (p problems) list() []source.Problem {
	out := []source.Problem{}
	for _, step := range slices.Sorted(maps.Keys(p.standing)) {
		out = append(out, p.standing[step]...)
	}
	return out
}
