// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package pinning

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/podgate/podgate/bpf"
	"github.com/podgate/podgate/bpf/policy"
)

// Applied is what [State.Apply] did.
type Applied struct {
	// Rulesets, Cells, Peers written and Gates flipped.
	Rulesets, Cells, Peers, Gates int
	// Problems are what could not be written, each with what it closes. The
	// rest of the update is in force.
	Problems []error
	Took     time.Duration
}

// grace is how long what is replaced stays readable: far longer than a packet
// can be on its way through the programs.
const grace = time.Second

// applied is the writer's picture of the policy that is pinned.
type applied struct {
	policies, rules, rulesets, classes *ids
	// cells by ruleset and class.
	cells map[uint32]map[uint32]cellInfo
	// peers as updates named them.
	peers map[policy.PeerKey]peer
	// subjects as published.
	subjects map[policy.PodKey]bpf.DatapathPod
	// nodes are the addresses of this node.
	nodes map[netip.Addr]struct{}
	// broken rulesets could not be written whole: their subjects are closed.
	broken map[policy.Digest]error
	// missing peers found no room: they have the class of what is around them.
	missing map[policy.PeerKey]error
	// said is what is broken and missing, in words.
	said []error
	// infos of what is pinned.
	infos  map[policy.Digest]policy.PolicyInfo
	sheets map[policy.Digest]policy.Ruleset
	// wanted remembers subjects, so that a mended ruleset opens them.
	wanted map[policy.PodKey]policy.Subject
}

// peer is the class and owner of an address or block.
type peer struct {
	class uint32
	owner uint16
}

type cellInfo struct {
	chunks uint16
	// intervals are not known of cells that were adopted and not named since.
	intervals []policy.Interval
}

// Apply carries the pinned policy to the next state in the order that
// [policy.Update] asks for. The first update of a process must be Full: it
// adopts what is pinned by digest and sweeps the rest.
//
// What a full map keeps from being written closes the endpoints concerned and
// is returned in Applied.Problems. It stays so through the updates that follow,
// each of which names it again as a [PolicyError]; a full update tries
// everything anew. The error is for failures that left the update undone; it
// may be applied again.
func (s *State) Apply(ctx context.Context, u policy.Update) (Applied, error) {
	start := time.Now()
	if s.applied == nil && !u.Full {
		return Applied{}, fmt.Errorf("%w: the first update of a process must be full", ErrInvalid)
	}
	if u.Full {
		// Adoption does not know since when something is of no use.
		if err := s.Sweep(ctx); err != nil {
			return Applied{}, err
		}
		a, err := s.adopt()
		if err != nil {
			return Applied{}, err
		}
		s.applied = a
		if err := s.dropChanged(u); err != nil {
			return Applied{}, err
		}
	}
	w := &writer{State: s, a: s.applied, now: start}
	if _, err := s.serviceTable(); err != nil {
		return Applied{}, err
	}
	if err := w.write(ctx, u); err != nil {
		return w.done, err
	}
	w.done.Took = time.Since(start)
	return w.done, nil
}

// writer is one Apply.
type writer struct {
	*State
	a    *applied
	done Applied
	now  time.Time
	// misplaced says that peers found no room, or that some did after all.
	misplaced bool
}

func (w *writer) problem(err error) {
	if err != nil {
		w.done.Problems = append(w.done.Problems, err)
	}
}

func (w *writer) write(ctx context.Context, u policy.Update) error {
	if err := w.Sweep(ctx); err != nil {
		return err
	}
	if err := w.infos(u); err != nil {
		return err
	}
	if err := w.rulesetsAndCells(u); err != nil {
		return err
	}
	if err := w.joins(u.Joins, u.GoneJoins, u.Full); err != nil {
		return err
	}
	for _, subject := range u.Subjects {
		w.a.wanted[subject.Pod] = subject
	}
	moves, err := w.moves(u)
	if err != nil {
		return err
	}
	first, then, err := w.cross(u, moves)
	if err != nil {
		return err
	}
	if err := w.setPeers(first); err != nil {
		return err
	}
	if err := w.revisit(u); err != nil {
		return err
	}
	if !u.Full && len(u.Peers)+len(u.GonePeers)+len(u.Joins)+len(u.Subjects) > 0 {
		w.reclassify(u)
	}
	if err := w.locked(ctx, func() error { return w.flip(u) }); err != nil {
		return err
	}
	if err := w.finish(then); err != nil {
		return err
	}
	if err := w.retire(u); err != nil {
		return err
	}
	w.say(u)
	return nil
}

// infos names policies and rules, for people.
func (w *writer) infos(u policy.Update) error {
	policies, err := w.m(bpf.DatapathMapPolicyInfo)
	if err != nil {
		return err
	}
	for _, p := range u.Policies {
		w.a.infos[p.ID] = p
		id, _, err := w.a.policies.assign(p.ID)
		if err != nil {
			w.problem(fmt.Errorf("policy %s/%s: %w", p.Namespace, p.Name, err))
			continue
		}
		v := bpf.DatapathPolicyInfo{Digest: bpf.DatapathDigest{Bytes: p.ID}}
		cutText(v.Uid[:], p.UID)
		cutText(v.Kind[:], p.Kind)
		cutText(v.Namespace[:], p.Namespace)
		cutText(v.Name[:], p.Name)
		if err := put(policies, &id, &v); err != nil {
			w.problem(fmt.Errorf("policy %s/%s: %w", p.Namespace, p.Name, err))
		}
	}
	for _, r := range u.Rules {
		if err := w.rule(r); err != nil {
			w.problem(fmt.Errorf("rule %q: %w", r.Text, err))
		}
	}
	return nil
}

func (w *writer) rule(r policy.RuleInfo) error {
	rules, err := w.m(bpf.DatapathMapRuleInfo)
	if err != nil {
		return err
	}
	id, isNew, err := w.a.rules.assign(r.ID)
	if err != nil {
		return err
	}
	v := bpf.DatapathRuleInfo{
		Digest: bpf.DatapathDigest{Bytes: r.ID}, Policy: w.a.policies.byDigest[r.Policy],
		Index: int32(r.Index), Direction: uint8(r.Direction), Action: uint8(r.Action),
	}
	cutText(v.Text[:], r.Text)
	if err := put(rules, &id, &v); err != nil {
		return err
	}
	if !isNew {
		return nil
	}
	counters, err := w.m(bpf.DatapathMapRuleCounters)
	if err != nil {
		return err
	}
	zero, err := zeroes[bpf.DatapathCounter]()
	if err != nil {
		return err
	}
	if err := counters.Put(id, zero); err != nil {
		return fmt.Errorf("%s: %w", counters, err)
	}
	return nil
}

// rulesetsAndCells writes what no gate refers to yet, and cells of new classes
// that no peer has yet. A ruleset that is not whole is broken.
func (w *writer) rulesetsAndCells(u policy.Update) error {
	w.mendBroken(u)
	classes, err := w.m(bpf.DatapathMapClasses)
	if err != nil {
		return err
	}
	for _, c := range u.Classes {
		id, _, err := w.a.classes.assign(c)
		if err != nil {
			w.problem(err)
			continue
		}
		if err := put(classes, &id, &bpf.DatapathDigest{Bytes: c}); err != nil {
			w.problem(fmt.Errorf("class: %w", err))
		}
	}
	for _, r := range u.Rulesets {
		w.a.sheets[r.ID] = r
		if _, _, err := w.a.rulesets.assign(r.ID); err != nil {
			w.breakRuleset(r.ID, err)
		}
	}
	if err := w.cells(u.Cells); err != nil {
		return err
	}
	for i := range u.Rulesets {
		if err := w.ruleset(&u.Rulesets[i]); err != nil {
			w.breakRuleset(u.Rulesets[i].ID, err)
		}
	}
	return nil
}

// mendBroken gives rulesets that are in the update another try.
func (w *writer) mendBroken(u policy.Update) {
	for _, r := range u.Rulesets {
		delete(w.a.broken, r.ID)
	}
}

func (w *writer) breakRuleset(d policy.Digest, err error) {
	if _, known := w.a.broken[d]; !known {
		w.a.broken[d] = err
	}
}

func (w *writer) ruleset(r *policy.Ruleset) error {
	id, ok := w.a.rulesets.byDigest[r.ID]
	if !ok {
		return w.a.broken[r.ID]
	}
	members, err := w.m(bpf.DatapathMapRulesetPolicies)
	if err != nil {
		return err
	}
	for i, p := range r.Policies {
		number := w.a.policies.byDigest[p]
		if err := put(members, &bpf.DatapathRulesetPolicyKey{Ruleset: id, Index: uint32(i)}, &number); err != nil {
			return err
		}
	}
	v := bpf.DatapathRuleset{
		Digest: bpf.DatapathDigest{Bytes: r.ID}, Rule: w.a.rules.byDigest[r.DefaultRule],
		Policies: uint32(len(r.Policies)), Direction: uint8(r.Direction), Action: uint8(r.Default),
		Flags: uint8(bpf.DatapathRulesetFlagsRULESET_USED),
	}
	if r.AnyPeer {
		v.Flags |= uint8(bpf.DatapathRulesetFlagsRULESET_ANY_PEER)
	}
	rulesets, err := w.m(bpf.DatapathMapRulesets)
	if err != nil {
		return err
	}
	w.done.Rulesets++
	return put(rulesets, &id, &v)
}

// chunksOf cuts a cell into map entries.
func (a *applied) chunksOf(c *policy.Cell, ruleset, class uint32) ([]bpf.DatapathCellKey, []bpf.DatapathCell, error) {
	const per = int(len(bpf.DatapathCell{}.Intervals))
	n := max(1, (len(c.Intervals)+per-1)/per)
	if n > cellChunks {
		return nil, nil, fmt.Errorf("%w: %d intervals, %d are the most", ErrFull, len(c.Intervals), cellChunks*per)
	}
	keys := make([]bpf.DatapathCellKey, n)
	values := make([]bpf.DatapathCell, n)
	for i := range n {
		part := c.Intervals[i*per : min(len(c.Intervals), (i+1)*per)]
		keys[i] = bpf.DatapathCellKey{Ruleset: ruleset, Class: class, Chunk: uint32(i)}
		values[i] = bpf.DatapathCell{
			Ruleset: ruleset, Class: class, Chunk: uint32(i), Chunks: uint16(n), Count: uint16(len(part)),
		}
		for j, v := range part {
			rule, ok := a.rules.byDigest[v.Rule]
			if !ok && v.Rule != (policy.Digest{}) {
				return nil, nil, fmt.Errorf("rule %s: %w", v.Rule, ErrNotFound)
			}
			to := &values[i].Intervals[j]
			to.First, to.Last, to.Rule, to.Action = v.First, v.Last, rule, uint32(v.Action)
		}
	}
	return keys, values, nil
}

// cellChunks is CELL_CHUNKS of bpf/include/types.h.
const cellChunks = 16384

func (w *writer) cells(cells []policy.Cell) error {
	m, err := w.m(bpf.DatapathMapCells)
	if err != nil {
		return err
	}
	b := batch[bpf.DatapathCellKey, bpf.DatapathCell]{m: m}
	owner := make([]policy.Digest, 0, batchSize)
	flush := func() {
		for i, err := range b.flush() {
			w.breakRuleset(owner[i], err)
		}
		owner = owner[:0]
	}
	for i := range cells {
		c := &cells[i]
		ruleset, ok := w.a.rulesets.byDigest[c.Ruleset]
		if !ok {
			continue
		}
		class, ok := w.a.classID(c.Class)
		if !ok {
			w.breakRuleset(c.Ruleset, fmt.Errorf("class %s: %w", c.Class, ErrNotFound))
			continue
		}
		keys, values, err := w.a.chunksOf(c, ruleset, class)
		if err != nil {
			w.breakRuleset(c.Ruleset, err)
			continue
		}
		// From the last to the first: the first one makes the cell exist.
		for j := len(keys) - 1; j >= 0; j-- {
			b.add(keys[j], values[j])
			owner = append(owner, c.Ruleset)
		}
		w.a.noteCell(ruleset, class, cellInfo{uint16(len(keys)), c.Intervals})
		w.done.Cells++
		if len(owner) >= batchSize {
			flush()
		}
	}
	flush()
	return nil
}

func (a *applied) noteCell(ruleset, class uint32, info cellInfo) {
	if a.cells[ruleset] == nil {
		a.cells[ruleset] = map[uint32]cellInfo{}
	}
	a.cells[ruleset][class] = info
}

func (a *applied) classID(d policy.Digest) (uint32, bool) {
	if d == (policy.Digest{}) {
		return 0, true
	}
	id, ok := a.classes.byDigest[d]
	return id, ok
}

func (w *writer) joins(set, gone []policy.Join, full bool) error {
	m, err := w.m(bpf.DatapathMapJoins)
	if err != nil {
		return err
	}
	keep := map[bpf.DatapathJoinKey]struct{}{}
	for _, j := range set {
		pod, ok1 := w.a.classID(j.Pod)
		block, ok2 := w.a.classID(j.Block)
		class, ok3 := w.a.classID(j.Class)
		if !ok1 || !ok2 || !ok3 {
			continue
		}
		key := bpf.DatapathJoinKey{Pod: pod, Block: block}
		keep[key] = struct{}{}
		if err := put(m, &key, &class); err != nil {
			w.problem(fmt.Errorf("join: %w", err))
		}
	}
	for _, j := range gone {
		pod, _ := w.a.classID(j.Pod)
		block, _ := w.a.classID(j.Block)
		if err := remove(m, &bpf.DatapathJoinKey{Pod: pod, Block: block}); err != nil {
			return err
		}
	}
	if !full {
		return nil
	}
	return sweepKeys(m, func(k bpf.DatapathJoinKey) bool { _, ok := keep[k]; return ok })
}

// retire removes what the flipped gates no longer need, the parts that packets
// on their way may still read after a time of grace.
func (w *writer) retire(u policy.Update) error {
	for _, d := range u.GoneRulesets {
		w.a.rulesets.forget(d, w.now)
		delete(w.a.broken, d)
		delete(w.a.sheets, d)
	}
	for _, d := range u.GoneClasses {
		w.a.classes.forget(d, w.now)
	}
	for _, d := range u.GoneRules {
		w.a.rules.condemn(d, w.now)
	}
	for _, d := range u.GonePolicies {
		delete(w.a.infos, d)
		w.a.policies.condemn(d, w.now)
	}
	if u.Full {
		w.retireUnnamed(u)
	}
	return nil
}

func (w *writer) retireUnnamed(u policy.Update) {
	named := map[policy.Digest]struct{}{}
	for _, r := range u.Rulesets {
		named[r.ID] = struct{}{}
	}
	for _, c := range u.Classes {
		named[c] = struct{}{}
	}
	for _, r := range u.Rules {
		named[r.ID] = struct{}{}
	}
	for _, p := range u.Policies {
		named[p.ID] = struct{}{}
	}
	for _, t := range []*ids{w.a.rulesets, w.a.classes, w.a.rules, w.a.policies} {
		for d := range t.byDigest {
			if _, ok := named[d]; !ok {
				t.forget(d, w.now)
			}
		}
	}
}

// Sweep removes what updates left for later, once its grace is over. Apply and
// Repair do it too.
func (s *State) Sweep(_ context.Context) error {
	a := s.applied
	if a == nil {
		return nil
	}
	before := time.Now().Add(-grace)
	var errs []error
	sh, err := s.memory()
	if err != nil {
		return err
	}
	inUse := map[uint32]struct{}{}
	for i := range sh.gates {
		e := sh.enforcement(uint32(i))
		inUse[e.Ingress], inUse[e.Egress] = struct{}{}, struct{}{}
	}
	for _, id := range a.rulesets.due(before) {
		if _, used := inUse[id]; !used {
			errs = append(errs, s.removeRuleset(id))
		}
	}
	var chosen map[uint32]struct{}
	for _, id := range a.classes.due(before) {
		if chosen == nil {
			chosen = s.chosen() // looks at every Service
		}
		if _, used := chosen[id]; !used {
			errs = append(errs, s.removeClass(id))
		}
	}
	errs = append(errs,
		s.sweepServices(),
		s.removeInfos(a.rules, bpf.DatapathMapRuleInfo, before),
		s.removeInfos(a.policies, bpf.DatapathMapPolicyInfo, before))
	return errors.Join(errs...)
}

func (s *State) removeInfos(t *ids, name string, before time.Time) error {
	m, err := s.m(name)
	if err != nil {
		return err
	}
	for _, id := range t.due(before) {
		if err := remove(m, &id); err != nil {
			return err
		}
		t.free(id)
	}
	return nil
}

func (s *State) removeCell(ruleset, class uint32, info cellInfo) error {
	m, err := s.m(bpf.DatapathMapCells)
	if err != nil {
		return err
	}
	// The first chunk goes first: without it there is no cell.
	for i := range uint32(info.chunks) {
		if err := remove(m, &bpf.DatapathCellKey{Ruleset: ruleset, Class: class, Chunk: i}); err != nil {
			return err
		}
	}
	delete(s.applied.cells[ruleset], class)
	return nil
}

func (s *State) removeRuleset(id uint32) error {
	rulesets, err := s.m(bpf.DatapathMapRulesets)
	if err != nil {
		return err
	}
	members, err := s.m(bpf.DatapathMapRulesetPolicies)
	if err != nil {
		return err
	}
	var v bpf.DatapathRuleset
	if err := rulesets.Lookup(id, &v); err != nil {
		return fmt.Errorf("%s: %w", rulesets, err)
	}
	if err := put(rulesets, &id, &bpf.DatapathRuleset{}); err != nil {
		return err
	}
	for class, info := range s.applied.cells[id] {
		if err := s.removeCell(id, class, info); err != nil {
			return err
		}
	}
	for i := range v.Policies {
		if err := remove(members, &bpf.DatapathRulesetPolicyKey{Ruleset: id, Index: i}); err != nil {
			return err
		}
	}
	delete(s.applied.cells, id)
	s.applied.rulesets.free(id)
	return nil
}

func (s *State) removeClass(id uint32) error {
	classes, err := s.m(bpf.DatapathMapClasses)
	if err != nil {
		return err
	}
	for ruleset, cells := range s.applied.cells {
		if info, ok := cells[id]; ok {
			if err := s.removeCell(ruleset, id, info); err != nil {
				return err
			}
		}
	}
	if err := remove(classes, &id); err != nil {
		return err
	}
	s.applied.classes.free(id)
	return nil
}
