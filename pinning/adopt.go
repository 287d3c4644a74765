// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package pinning

import (
	"fmt"
	"net/netip"
	"time"

	"github.com/podgate/podgate/bpf"
	"github.com/podgate/podgate/bpf/policy"
)

// adopt reads back what an earlier process pinned.
func (s *State) adopt() (*applied, error) {
	c, err := s.capacity()
	if err != nil {
		return nil, err
	}
	rulesets, err := s.m(bpf.DatapathMapRulesets)
	if err != nil {
		return nil, err
	}
	a := &applied{
		policies: newIDs("policies", 1, c.Rules),
		rules:    newIDs("rules", 1, c.Rules-1),
		rulesets: newIDs("rulesets", rulesetFirst, rulesets.MaxEntries()-1),
		classes:  newIDs("classes", 1, peerService-1),
		cells:    map[uint32]map[uint32]cellInfo{},
		peers:    map[policy.PeerKey]peer{},
		subjects: map[policy.PodKey]bpf.DatapathPod{},
		nodes:    map[netip.Addr]struct{}{},
		broken:   map[policy.Digest]error{},
		missing:  map[policy.PeerKey]error{},
		infos:    map[policy.Digest]policy.PolicyInfo{},
		sheets:   map[policy.Digest]policy.Ruleset{},
		wanted:   map[policy.PodKey]policy.Subject{},
	}
	if err := s.adoptRulesets(a); err != nil {
		return nil, err
	}
	if err := s.adoptInfos(a); err != nil {
		return nil, err
	}
	peers, err := s.m(bpf.DatapathMapPeers)
	if err != nil {
		return nil, err
	}
	known, err := dump[bpf.DatapathAddress, bpf.DatapathPeer](peers)
	if err != nil {
		return nil, err
	}
	for w, p := range known {
		if p.Class&peerNode != 0 {
			a.nodes[unwire(w)] = struct{}{}
		}
	}
	return a, nil
}

func (s *State) adoptRulesets(a *applied) error {
	m, err := s.m(bpf.DatapathMapRulesets)
	if err != nil {
		return err
	}
	all, err := dump[uint32, bpf.DatapathRuleset](m)
	if err != nil {
		return err
	}
	for id, r := range all {
		if r.Flags&uint8(bpf.DatapathRulesetFlagsRULESET_USED) != 0 {
			a.rulesets.adopt(r.Digest.Bytes, id)
		}
	}
	return nil
}

func (s *State) adoptInfos(a *applied) error {
	classes, err := s.m(bpf.DatapathMapClasses)
	if err != nil {
		return err
	}
	digests, err := dump[uint32, bpf.DatapathDigest](classes)
	if err != nil {
		return err
	}
	for id, d := range digests {
		a.classes.adopt(d.Bytes, id)
	}
	rules, err := s.m(bpf.DatapathMapRuleInfo)
	if err != nil {
		return err
	}
	infos, err := dump[uint32, bpf.DatapathRuleInfo](rules)
	if err != nil {
		return err
	}
	for id, r := range infos {
		a.rules.adopt(r.Digest.Bytes, id)
	}
	policies, err := s.m(bpf.DatapathMapPolicyInfo)
	if err != nil {
		return err
	}
	named, err := dump[uint32, bpf.DatapathPolicyInfo](policies)
	if err != nil {
		return err
	}
	for id, p := range named {
		a.policies.adopt(p.Digest.Bytes, id)
	}
	return nil
}

// dropChanged compares adopted cells with what a full update says. A ruleset
// whose cells are not what its digest promises, because a process died while
// writing or somebody else wrote, gets a new number and is written anew.
func (s *State) dropChanged(u policy.Update) error {
	a := s.applied
	m, err := s.m(bpf.DatapathMapCells)
	if err != nil {
		return err
	}
	pinned, err := dump[bpf.DatapathCellKey, bpf.DatapathCell](m)
	if err != nil {
		return err
	}
	for k, c := range pinned {
		if k.Chunk == 0 {
			a.noteCell(k.Ruleset, k.Class, cellInfo{chunks: c.Chunks})
		}
	}
	if err := s.sweepOrphans(pinned); err != nil {
		return err
	}
	expected := map[uint32]map[uint32]struct{}{}
	changed := map[policy.Digest]struct{}{}
	for i := range u.Cells {
		c := &u.Cells[i]
		ruleset, ok1 := a.rulesets.byDigest[c.Ruleset]
		class, ok2 := a.classID(c.Class)
		if !ok1 || !ok2 {
			continue
		}
		if expected[ruleset] == nil {
			expected[ruleset] = map[uint32]struct{}{}
		}
		expected[ruleset][class] = struct{}{}
		if !a.sameCell(c, ruleset, class, pinned) {
			changed[c.Ruleset] = struct{}{}
		}
	}
	classes := map[uint32]struct{}{0: {}}
	for _, d := range u.Classes {
		if id, ok := a.classes.byDigest[d]; ok {
			classes[id] = struct{}{}
		}
	}
	for _, r := range u.Rulesets {
		id, ok := a.rulesets.byDigest[r.ID]
		if !ok {
			continue
		}
		for class := range a.cells[id] {
			_, known := classes[class]
			if _, want := expected[id][class]; known && !want {
				changed[r.ID] = struct{}{}
			}
		}
	}
	for d := range changed {
		s.log.Info("ruleset is written anew", "ruleset", d)
		a.rulesets.forget(d, time.Now())
	}
	return nil
}

// sameCell compares a cell with its pinned chunks; one that is not pinned at
// all is simply still to be written.
func (a *applied) sameCell(c *policy.Cell, ruleset, class uint32, pinned map[bpf.DatapathCellKey]bpf.DatapathCell) bool {
	keys, values, err := a.chunksOf(c, ruleset, class)
	if err != nil {
		return false
	}
	if _, ok := pinned[keys[0]]; !ok {
		return true
	}
	for i, k := range keys {
		if pinned[k] != values[i] {
			return false
		}
	}
	return true
}

// sweepOrphans removes chunks of cells without a ruleset or a first chunk.
func (s *State) sweepOrphans(pinned map[bpf.DatapathCellKey]bpf.DatapathCell) error {
	m, err := s.m(bpf.DatapathMapCells)
	if err != nil {
		return err
	}
	for k := range pinned {
		_, used := s.applied.rulesets.used[k.Ruleset]
		info, whole := s.applied.cells[k.Ruleset][k.Class]
		if used && whole && k.Chunk < uint32(info.chunks) {
			continue
		}
		if err := remove(m, &k); err != nil {
			return fmt.Errorf("orphan cell: %w", err)
		}
		if !used {
			delete(s.applied.cells, k.Ruleset)
		}
	}
	return nil
}
