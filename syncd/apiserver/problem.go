// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/podgate/podgate/syncd/manifest"
	"github.com/podgate/podgate/syncd/source"
)

// server is the API server as problems name it.
func (s *Source) server() string { return "API server " + s.opts.Config.Host }

// problems runs under the source's lock.
func (s *Source) problems(now time.Time) []source.Problem {
	out := s.outages(now)
	for _, f := range s.followers {
		if f.kind == manifest.KindNode && f.synced && !f.knows(s.opts.Node) {
			out = append(out, source.Problem{
				Subject: s.server(),
				Reason:  fmt.Sprintf("there is no Node %s: no pod is one of this node; see --node-name", s.opts.Node),
			})
		}
		for _, key := range slices.SortedFunc(maps.Keys(f.faults), manifest.Key.Compare) {
			out = append(out, source.Problem{Subject: key.String(), Object: key, Reason: f.faults[key] + consequence(f.kind)})
		}
	}
	return out
}

// consequence says what a fault means for enforcement.
func consequence(kind string) string {
	switch kind {
	case manifest.KindNetworkPolicy:
		return "; the pods it selects are isolated, and what of it is not understood allows nothing"
	case manifest.KindPod:
		return "; what of it is not understood matches nothing"
	default:
		return "; what of it is not understood is left out"
	}
}

// outages are the answers that are missing, resources with the same one
// together. Runs under the source's lock.
func (s *Source) outages(now time.Time) []source.Problem {
	type outage struct {
		plurals []string
		since   time.Time
		synced  bool
	}
	outages := make(map[string]*outage)
	for _, f := range s.followers {
		since, reason := f.outage(now, s.opts.Patience)
		if reason == "" {
			continue
		}
		o := outages[reason]
		if o == nil {
			o = &outage{since: since, synced: true}
			outages[reason] = o
		}
		o.plurals = append(o.plurals, f.plural)
		o.synced = o.synced && f.synced
		if since.Before(o.since) {
			o.since = since
		}
	}
	var out []source.Problem
	for _, reason := range slices.Sorted(maps.Keys(outages)) {
		o := outages[reason]
		effect := "what it said before stays in force"
		if !o.synced {
			effect = "what was enforced before stays so"
		}
		out = append(out, source.Problem{
			Subject: s.server(),
			Reason:  fmt.Sprintf("%s: %s; %s", strings.Join(o.plurals, ", "), reason, effect),
			Since:   o.since,
		})
	}
	return out
}

// silence is why nothing could be loaded.
func (s *Source) silence() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var failed []error
	for _, p := range s.outages(time.Now()) {
		failed = append(failed, fmt.Errorf("%s: %s", p.Subject, p.Reason))
	}
	if len(failed) == 0 {
		return fmt.Errorf("%s: not everything was answered within %v", s.server(), s.opts.Patience)
	}
	return errors.Join(failed...)
}

// knowsAll tells whether all objects of all kinds are there.
func (s *Source) knowsAll() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return !slices.ContainsFunc(s.followers, func(f *follower) bool { return !f.synced })
}
