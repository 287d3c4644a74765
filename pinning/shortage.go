// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package pinning

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"

	"github.com/podgate/podgate/bpf"
	"github.com/podgate/podgate/bpf/policy"
)

// PolicyError is what became of policies that could not be written whole, the
// members of one ruleset.
type PolicyError struct {
	Policies []policy.PolicyInfo
	Err      error
}

// Error names the policies.
func (e *PolicyError) Error() string {
	names := make([]string, 0, len(e.Policies))
	for _, p := range e.Policies {
		names = append(names, strings.TrimPrefix(p.Namespace+"/"+p.Name, "/"))
	}
	return fmt.Sprintf("policy %s: %v", strings.Join(names, ", "), e.Err)
}

// Unwrap is why.
func (e *PolicyError) Unwrap() error { return e.Err }

// classUnknown is the class of a peer whose class has no number.
const classUnknown = math.MaxUint32

// placed notes whether a peer has found room.
func (w *writer) placed(key policy.PeerKey, err error) {
	_, was := w.a.missing[key]
	switch {
	case err != nil:
		w.a.missing[key] = err
	case was:
		delete(w.a.missing, key)
	}
	w.misplaced = w.misplaced || was != (err != nil)
}

// revisit gives peers that found no room another try, where an update may have
// changed what they are taken for meanwhile, and closes the rulesets that would
// let them do more than they should: a block inside one that is allowed, or
// outside all that is not denied.
func (w *writer) revisit(u policy.Update) error {
	isBlock := func(p policy.PeerEntry) bool { return !p.Exact }
	if len(w.a.missing) == 0 || !w.misplaced && !u.Full &&
		len(u.Rulesets)+len(u.Cells)+len(u.GonePeers) == 0 && !slices.ContainsFunc(u.Peers, isBlock) {
		return nil
	}
	if !u.Full {
		if err := w.retry(); err != nil {
			return err
		}
	}
	type pair struct{ class, around uint32 }
	seen := map[pair]struct{}{}
	for key, err := range w.a.missing {
		p := pair{w.a.peers[key].class, w.a.covering(key.Prefix)}
		if _, again := seen[p]; again || p.class == p.around {
			continue
		}
		seen[p] = struct{}{}
		for ruleset, cells := range w.a.cells {
			d := w.a.rulesets.used[ruleset]
			if sheet, ok := w.a.sheets[d]; ok && opens(&sheet, cells, p.class, p.around) {
				w.breakRuleset(d, err)
			}
		}
	}
	return nil
}

// retry writes the peers that are missing, as far as there is room.
func (w *writer) retry() error {
	peers, err := w.m(bpf.DatapathMapPeers)
	if err != nil {
		return err
	}
	blocks, err := w.m(bpf.DatapathMapBlocks)
	if err != nil {
		return err
	}
	before := len(w.a.missing)
	var full [2]bool
	holesFirst := func(a, b policy.PeerKey) int { return cmp.Compare(b.Prefix.Bits(), a.Prefix.Bits()) }
	for _, key := range slices.SortedFunc(maps.Keys(w.a.missing), holesFirst) {
		p := w.a.peers[key]
		if p.class == classUnknown {
			continue
		}
		kind := 0
		if key.Exact {
			kind = 1
		}
		if full[kind] {
			continue
		}
		var err error
		if key.Exact {
			a := wire(key.Prefix.Addr())
			err = put(peers, &a, &bpf.DatapathPeer{Class: p.class | w.bits(key.Prefix.Addr()), Owner: p.owner, Tag: tag(a)})
		} else {
			k := blockKey(key.Prefix)
			err = put(blocks, &k, &bpf.DatapathPeer{Class: p.class})
		}
		w.placed(key, err)
		full[kind] = errors.Is(err, ErrFull)
	}
	if len(w.a.missing) == before {
		return nil
	}
	return w.addressesMoved()
}

// opens says whether a ruleset allows one class anything that it denies
// another.
func opens(r *policy.Ruleset, cells map[uint32]cellInfo, denied, allowed uint32) bool {
	intervals := func(class uint32) []policy.Interval {
		if c, ok := cells[class]; ok {
			return c.intervals
		}
		return cells[0].intervals
	}
	action := func(list []policy.Interval, at uint32) policy.Action {
		i, _ := slices.BinarySearchFunc(list, at, func(v policy.Interval, at uint32) int { return cmp.Compare(v.Last, at) })
		if i < len(list) && list[i].First <= at {
			return list[i].Action
		}
		return r.Default
	}
	a, b := intervals(denied), intervals(allowed)
	edges := []uint32{0}
	for _, list := range [][]policy.Interval{a, b} {
		for _, v := range list {
			edges = append(edges, v.First, v.Last+1)
		}
	}
	return slices.ContainsFunc(edges, func(at uint32) bool {
		return at <= policy.MaxCoordinate && action(a, at) == policy.Deny && action(b, at) != policy.Deny
	})
}

// say names what is broken and missing among the problems.
func (w *writer) say(u policy.Update) {
	if u.Full || w.misplaced || len(u.Rulesets)+len(u.Cells)+len(u.GoneRulesets)+len(u.GonePeers) > 0 {
		w.a.said = w.a.shortages()
	}
	w.done.Problems = append(w.done.Problems, w.a.said...)
}

// shortages are what is broken and missing, by ruleset.
func (a *applied) shortages() []error {
	var out []error
	for d, err := range a.broken {
		out = append(out, a.about(d, fmt.Errorf("its endpoints are closed: %w", err)))
	}
	type lack struct {
		peers int
		err   error
	}
	classes := map[uint32]lack{}
	for key, err := range a.missing {
		class := a.peers[key].class
		classes[class] = lack{classes[class].peers + 1, err}
	}
	rulesets := map[policy.Digest]lack{}
	unnamed := lack{}
	for class, l := range classes {
		named := false
		for ruleset, cells := range a.cells {
			d := a.rulesets.used[ruleset]
			_, broken := a.broken[d]
			_, pinned := a.sheets[d]
			if _, has := cells[class]; has && pinned {
				named = true
				if !broken {
					rulesets[d] = lack{rulesets[d].peers + l.peers, l.err}
				}
			}
		}
		if !named {
			unnamed = lack{unnamed.peers + l.peers, l.err}
		}
	}
	for d, l := range rulesets {
		out = append(out, a.about(d, fmt.Errorf("%d of its addresses and blocks found no room, and are allowed no more than others: %w", l.peers, l.err)))
	}
	if unnamed.peers > 0 {
		out = append(out, fmt.Errorf("%d addresses and blocks found no room, and are taken for others: %w", unnamed.peers, unnamed.err))
	}
	return out
}

// about names the policies of a ruleset.
func (a *applied) about(ruleset policy.Digest, err error) error {
	e := &PolicyError{Err: err}
	for _, p := range a.sheets[ruleset].Policies {
		if info, ok := a.infos[p]; ok {
			e.Policies = append(e.Policies, info)
		}
	}
	if len(e.Policies) == 0 {
		return fmt.Errorf("ruleset %s: %w", ruleset, err)
	}
	return e
}
