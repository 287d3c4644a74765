// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package syncd

import (
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

// replace replaces the problems of a step. Those without a date get that of
// the same problem before, or the present.
func (p problems) replace(step string, next []source.Problem) {
	next = slices.Clone(next)
	before := p.standing[step]
	for i := range next {
		same := slices.IndexFunc(before, func(o source.Problem) bool { return o.Subject == next[i].Subject && o.Reason == next[i].Reason })
		switch {
		case same >= 0:
			next[i].Since = before[same].Since
		default:
			if next[i].Since.IsZero() {
				next[i].Since = time.Now()
			}
			p.log.Error("problem", "subject", next[i].Subject, "reason", next[i].Reason)
			p.notify(next[i])
		}
	}
	for _, o := range before {
		if !slices.ContainsFunc(next, func(n source.Problem) bool { return o.Subject == n.Subject && o.Reason == n.Reason }) {
			p.log.Info("problem solved", "subject", o.Subject, "reason", o.Reason)
		}
	}
	if len(next) == 0 {
		delete(p.standing, step)
		return
	}
	p.standing[step] = next
}

// list answers all problems in a stable order; never nil.
func (p problems) list() []source.Problem {
	out := []source.Problem{}
	for _, step := range slices.Sorted(maps.Keys(p.standing)) {
		out = append(out, p.standing[step]...)
	}
	return out
}
