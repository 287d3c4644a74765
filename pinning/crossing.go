// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package pinning

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/cilium/ebpf"

	"github.com/podgate/podgate/bpf"
	"github.com/podgate/podgate/bpf/policy"
)

// A compiler that has just started does not know the rulesets that another
// process pinned and that its own replace: they have no cells for its new
// classes, nor its rulesets for the old classes. A peer that moves from class
// A to class B therefore crosses over a class of its own, whose cells are A's
// in the rulesets that go and B's in those that come. While gates flip, every
// ruleset knows every peer.
type crossing struct{ from, to uint32 }

// digest makes a crossing's class known to a process that finds it pinned.
func (c crossing) digest() policy.Digest {
	d := policy.Digest{'c', 'r', 'o', 's', 's'}
	binary.BigEndian.PutUint32(d[8:], c.from)
	binary.BigEndian.PutUint32(d[12:], c.to)
	return d
}

// cross returns the moves to make before gates flip, over crossings where
// needed, and those to complete after.
func (w *writer) cross(u policy.Update, moves []move) (first, then []move, err error) {
	going := w.going(u)
	first = make([]move, 0, len(moves))
	for _, m := range moves {
		if m.gone {
			then = append(then, m)
		}
		from := m.class
		if len(going) > 0 {
			if from, err = w.currentClass(m.key); err != nil {
				return nil, nil, err
			}
		}
		if from == m.class {
			if !m.gone {
				first = append(first, m)
			}
			continue
		}
		over, err := w.makeCrossing(crossing{from, m.class}, going, u.Rulesets)
		if err != nil {
			return nil, nil, err
		}
		if !m.gone {
			then = append(then, m)
		}
		m.class = over
		first = append(first, m)
	}
	return first, then, nil
}

// going are the adopted rulesets that a full update replaces.
func (w *writer) going(u policy.Update) []uint32 {
	if !u.Full {
		return nil
	}
	named := map[policy.Digest]struct{}{}
	for _, r := range u.Rulesets {
		named[r.ID] = struct{}{}
	}
	var ids []uint32
	for id, d := range w.a.rulesets.used {
		if _, stays := named[d]; !stays || w.a.rulesets.byDigest[d] != id {
			ids = append(ids, id)
		}
	}
	return ids
}

// currentClass is what the datapath makes of a peer now.
func (w *writer) currentClass(p policy.PeerKey) (uint32, error) {
	if p.Exact {
		class, err := w.peerClass(p.Prefix.Addr())
		return class &^ peerBits, err
	}
	return w.blockClass(p.Prefix)
}

// blockClass is the class of the longest block around a prefix.
func (s *State) blockClass(p netip.Prefix) (uint32, error) {
	blocks, err := s.m(bpf.DatapathMapBlocks)
	if err != nil {
		return 0, err
	}
	key := blockKey(p)
	var v bpf.DatapathPeer
	if err := blocks.Lookup(&key, &v); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return 0, fmt.Errorf("%s: %w", blocks, err)
	}
	return v.Class, nil
}

func (w *writer) makeCrossing(c crossing, going []uint32, coming []policy.Ruleset) (uint32, error) {
	classes, err := w.m(bpf.DatapathMapClasses)
	if err != nil {
		return 0, err
	}
	id, isNew, err := w.a.classes.assign(c.digest())
	if err != nil || !isNew {
		return id, err
	}
	if err := put(classes, &id, &bpf.DatapathDigest{Bytes: c.digest()}); err != nil {
		return 0, err
	}
	for _, ruleset := range going {
		if err := w.copyCell(ruleset, c.from, id); err != nil {
			return 0, err
		}
	}
	for _, r := range coming {
		ruleset, ok := w.a.rulesets.byDigest[r.ID]
		if !ok {
			continue
		}
		if err := w.copyCell(ruleset, c.to, id); err != nil {
			return 0, err
		}
	}
	return id, nil
}

// copyCell gives a class the cell another one has in a ruleset. A cell that is
// absent falls back the same way for both.
func (w *writer) copyCell(ruleset, from, to uint32) error {
	info, ok := w.a.cells[ruleset][from]
	if !ok {
		return nil
	}
	m, err := w.m(bpf.DatapathMapCells)
	if err != nil {
		return err
	}
	for chunk := int(info.chunks) - 1; chunk >= 0; chunk-- {
		key := bpf.DatapathCellKey{Ruleset: ruleset, Class: from, Chunk: uint32(chunk)}
		var v bpf.DatapathCell
		if err := m.Lookup(&key, &v); err != nil {
			return fmt.Errorf("%s: %w", m, err)
		}
		key.Class, v.Class = to, to
		if err := put(m, &key, &v); err != nil {
			return err
		}
	}
	w.a.noteCell(ruleset, to, info)
	return nil
}
