// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package pinning

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"

	"github.com/podgate/podgate/bpf"
	"github.com/podgate/podgate/bpf/policy"
)

// move gives an address or block a class.
type move struct {
	key   policy.PeerKey
	class uint32
	owner uint16
	// gone entries are removed in the end; class is what they fall to.
	gone bool
}

// moves lists what an update does to peers.
func (w *writer) moves(u policy.Update) ([]move, error) {
	out := make([]move, 0, len(u.Peers))
	for _, p := range u.Peers {
		key := policy.PeerKey{Prefix: p.Prefix, Exact: p.Exact}
		class, ok := w.a.classID(p.Class)
		if !ok {
			w.a.peers[key] = peer{class: classUnknown}
			w.placed(key, fmt.Errorf("class %s: %w", p.Class, ErrNotFound))
			continue
		}
		w.a.peers[key] = peer{class, p.Owner}
		out = append(out, move{key: key, class: class, owner: p.Owner})
	}
	w.done.Peers += len(out)
	if !u.Full {
		return out, nil
	}
	unnamed, err := w.unnamed(u)
	return append(out, unnamed...), err
}

// unnamed are pinned entries that a full update does not name. They go, but
// for the addresses of this node and of endpoints, which get the class they
// have without an entry.
func (w *writer) unnamed(u policy.Update) ([]move, error) {
	blocks, err := w.m(bpf.DatapathMapBlocks)
	if err != nil {
		return nil, err
	}
	peers, err := w.m(bpf.DatapathMapPeers)
	if err != nil {
		return nil, err
	}
	prefixes, err := keysOf[bpf.DatapathBlockKey](blocks)
	if err != nil {
		return nil, err
	}
	addresses, err := dump[bpf.DatapathAddress, bpf.DatapathPeer](peers)
	if err != nil {
		return nil, err
	}
	held := w.held()
	var out []move
	for _, k := range prefixes {
		key := policy.PeerKey{Prefix: blockPrefix(k)}
		if _, named := w.a.peers[key]; !named {
			out = append(out, move{key: key, class: w.a.covering(key.Prefix), gone: true})
		}
	}
	for k := range addresses {
		a := unwire(k)
		key := exactKey(a)
		if _, named := w.a.peers[key]; named {
			continue
		}
		m := move{key: key, class: w.a.covering(key.Prefix), gone: true}
		if holder, ok := held[a]; ok {
			m.gone, m.owner = false, holder.Pod.Owner()
			if subject, known := w.a.wanted[holder.Pod]; known {
				m.class = w.a.joined(subject.Class, m.class, u.Joins)
			}
		} else if w.bits(a) != 0 {
			m.gone = false
		}
		out = append(out, m)
	}
	return out, nil
}

// held are the addresses of endpoints.
func (w *writer) held() map[netip.Addr]Endpoint {
	out := map[netip.Addr]Endpoint{}
	for e, err := range w.Endpoints() {
		if err != nil {
			w.problem(err)
			continue
		}
		for _, a := range e.Addresses {
			if !a.IsLinkLocalUnicast() {
				out[a] = e
			}
		}
	}
	return out
}

func exactKey(a netip.Addr) policy.PeerKey {
	return policy.PeerKey{Prefix: netip.PrefixFrom(a, a.BitLen()), Exact: true}
}

// covering is the class of the longest block around a prefix that is there.
func (a *applied) covering(p netip.Prefix) uint32 {
	for bits := p.Bits(); bits >= 0; bits-- {
		around, err := p.Addr().Prefix(bits)
		if err != nil {
			return 0
		}
		key := policy.PeerKey{Prefix: around}
		if class, named := a.peers[key]; named {
			if _, missing := a.missing[key]; !missing {
				return class.class
			}
		}
	}
	return 0
}

// joined is the class of a pod inside a block, as [State.join] finds it.
func (a *applied) joined(pod policy.Digest, block uint32, joins []policy.Join) uint32 {
	class, ok := a.classID(pod)
	if !ok || class == 0 || block == 0 {
		return max(class, block)
	}
	for _, j := range joins {
		if id, ok := a.classID(j.Block); ok && id == block && j.Pod == pod {
			if class, ok := a.classID(j.Class); ok {
				return class
			}
		}
	}
	return block
}

// setPeers makes moves. Whatever class a peer has, old or new, every ruleset
// has its cells by now.
func (w *writer) setPeers(list []move) error {
	peers, err := w.m(bpf.DatapathMapPeers)
	if err != nil {
		return err
	}
	blocks, err := w.m(bpf.DatapathMapBlocks)
	if err != nil {
		return err
	}
	exact := batch[bpf.DatapathAddress, bpf.DatapathPeer]{m: peers}
	// Holes come before what is around them: if there is no room for both it is
	// better to have the hole.
	slices.SortFunc(list, func(a, b move) int { return cmp.Compare(b.key.Prefix.Bits(), a.key.Prefix.Bits()) })
	var moved []move
	flush := func() {
		failed := exact.flush()
		for i, m := range moved {
			w.placed(m.key, failed[i])
		}
		moved = moved[:0]
	}
	for _, m := range list {
		if !m.key.Exact {
			key := blockKey(m.key.Prefix)
			w.placed(m.key, put(blocks, &key, &bpf.DatapathPeer{Class: m.class}))
			continue
		}
		a := wire(m.key.Prefix.Addr())
		exact.add(a, bpf.DatapathPeer{Class: m.class | w.bits(m.key.Prefix.Addr()), Owner: m.owner, Tag: tag(a)})
		if moved = append(moved, m); len(moved) == batchSize {
			flush()
		}
	}
	flush()
	if err := w.addressesMoved(); err != nil {
		return err
	}
	keys := make([]policy.PeerKey, 0, len(list))
	for _, m := range list {
		keys = append(keys, m.key)
	}
	return w.rechoose(keys)
}

// finish sets the classes that peers crossed to and removes what is gone.
func (w *writer) finish(list []move) error {
	var stay []move
	var gone []policy.PeerKey
	for _, m := range list {
		if !m.gone {
			stay = append(stay, m)
			continue
		}
		if err := w.removePeer(m.key); err != nil {
			return err
		}
		delete(w.a.missing, m.key)
		gone = append(gone, m.key)
	}
	if len(list) == 0 {
		return nil
	}
	if err := w.rechoose(gone); err != nil {
		return err
	}
	return w.setPeers(stay)
}

// reclassify gives their class to addresses that updates do not name: those of
// endpoints, which have an entry even where their block's class is theirs, the
// node's own and those of Services.
func (w *writer) reclassify(u policy.Update) {
	for e, err := range w.Endpoints() {
		if err != nil {
			w.problem(err)
			continue
		}
		if subject, ok := w.a.wanted[e.Pod]; ok {
			w.problem(w.reclassifyEndpoint(e, subject.Class))
		}
	}
	for a := range w.a.nodes {
		w.problem(w.mark(a, peerNode))
	}
	w.reclassifyServices(u)
}

// reclassifyServices does so where blocks have changed: there may be thousands.
func (w *writer) reclassifyServices(u policy.Update) {
	var changed []netip.Prefix
	for _, p := range u.Peers {
		if !p.Exact {
			changed = append(changed, p.Prefix)
		}
	}
	for _, p := range u.GonePeers {
		if !p.Exact {
			changed = append(changed, p.Prefix)
		}
	}
	within := contains(changed)
	for a := range w.services.marked {
		if within(a) {
			w.problem(w.mark(a, peerService))
		}
	}
}

// contains tells of addresses whether any of the blocks has them, in a time that
// grows with their lengths and not with their number.
func contains(blocks []netip.Prefix) func(netip.Addr) bool {
	set := make(map[netip.Prefix]struct{}, len(blocks))
	var lengths []int
	for _, p := range blocks {
		set[p.Masked()] = struct{}{}
		if !slices.Contains(lengths, p.Bits()) {
			lengths = append(lengths, p.Bits())
		}
	}
	return func(a netip.Addr) bool {
		return slices.ContainsFunc(lengths, func(bits int) bool {
			p, err := a.Prefix(bits)
			_, has := set[p]
			return err == nil && has
		})
	}
}

func (w *writer) reclassifyEndpoint(e Endpoint, d policy.Digest) error {
	class, ok := w.a.classID(d)
	if !ok {
		return fmt.Errorf("endpoint %s: class %s: %w", e.Key, d, ErrNotFound)
	}
	for _, a := range e.Addresses {
		if _, named := w.a.peers[exactKey(a)]; named || a.IsLinkLocalUnicast() {
			continue
		}
		if err := w.setClass(e.Pod, class, a); err != nil {
			return err
		}
	}
	return nil
}

// restorePeers puts back the entries of an endpoint's addresses that an update
// named and ADD could only guess, and tells whether there was one.
func (s *State) restorePeers(e Endpoint) (restored bool, err error) {
	if s.applied == nil {
		return false, nil
	}
	peers, err := s.m(bpf.DatapathMapPeers)
	if err != nil {
		return false, err
	}
	for _, a := range e.Addresses {
		want, named := s.applied.peers[exactKey(a)]
		if !named || want.class == classUnknown {
			continue
		}
		w := wire(a)
		v := bpf.DatapathPeer{Class: want.class | s.bits(a), Owner: want.owner, Tag: tag(w)}
		var have bpf.DatapathPeer
		if err := peers.Lookup(&w, &have); err == nil && have == v {
			continue
		}
		if err := put(peers, &w, &v); err != nil {
			return restored, err
		}
		restored = true
	}
	return restored, nil
}
