// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package pinning

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/cilium/ebpf"

	"github.com/podgate/podgate/bpf"
	"github.com/podgate/podgate/bpf/policy"
)

// flip publishes subjects and turns the gates that follow them. An endpoint
// whose subject is unknown, or gone, keeps what it has. The epoch comes last:
// what packets meanwhile were judged by may be of before.
func (w *writer) flip(u policy.Update) error {
	pods, err := w.m(bpf.DatapathMapPods)
	if err != nil {
		return err
	}
	flipped := u.Subjects
	if len(w.a.broken) > 0 || len(u.Rulesets) > 0 {
		// Rulesets broke or were mended: all that use them are concerned.
		flipped = nil
		for _, subject := range w.a.wanted {
			flipped = append(flipped, subject)
		}
	}
	for _, subject := range flipped {
		if err := w.publish(pods, subject); err != nil {
			w.problem(fmt.Errorf("pod %s/%s: %w", subject.Namespace, subject.Name, err))
		}
	}
	if err := w.unpublish(pods, u); err != nil {
		return err
	}
	if len(flipped) > 0 || u.Full {
		w.turnAll()
	}
	if err := w.removePeers(u.GonePeers); err != nil {
		return err
	}
	return w.addressesMoved()
}

func (w *writer) publish(pods *ebpf.Map, subject policy.Subject) error {
	key, err := podWire(subject.Pod)
	if err != nil {
		return err
	}
	var enforced [2]uint32
	for d, ruleset := range subject.Rulesets {
		enforced[d] = w.rulesetID(ruleset)
	}
	class, _ := w.a.classID(subject.Class)
	v := bpf.DatapathPod{
		Rulesets: bpf.DatapathEnforcement{Ingress: enforced[policy.Ingress], Egress: enforced[policy.Egress]},
		Class:    class, Owner: subject.Owner, Tag: podTag(subject.Pod),
	}
	if subject.Audit {
		v.Flags = uint16(bpf.DatapathGateFlagsGATE_AUDIT)
	}
	if w.a.subjects[subject.Pod] == v {
		return nil
	}
	// Gates follow even what could not be published for ADD to find.
	w.a.subjects[subject.Pod] = v
	if err := put(pods, &key, &v); err != nil {
		// The rulesets of the entry of before may soon be another's.
		return errors.Join(err, remove(pods, &key))
	}
	return nil
}

// rulesetID is closed for a ruleset that is not whole.
func (w *writer) rulesetID(d policy.Digest) uint32 {
	if d == policy.Open {
		return RulesetOpen
	}
	if _, broken := w.a.broken[d]; broken {
		return RulesetClosed
	}
	// Zero, closed, for one nobody wrote.
	return w.a.rulesets.byDigest[d]
}

func (w *writer) unpublish(pods *ebpf.Map, u policy.Update) error {
	for _, pod := range u.GoneSubjects {
		key, err := podWire(pod)
		if err != nil {
			return err
		}
		if err := remove(pods, &key); err != nil {
			return err
		}
		delete(w.a.subjects, pod)
		delete(w.a.wanted, pod)
	}
	if !u.Full {
		return nil
	}
	return sweepKeys(pods, func(k bpf.DatapathPodKey) bool {
		_, ok := w.a.subjects[policy.PodKey(text(k.Id[:]))]
		return ok
	})
}

// removePeers takes addresses and blocks away that have no class of their own
// any more.
func (w *writer) removePeers(gone []policy.PeerKey) error {
	for _, p := range gone {
		delete(w.a.peers, p)
		delete(w.a.missing, p)
		if err := w.removePeer(p); err != nil {
			return err
		}
	}
	return w.rechoose(gone)
}

func (w *writer) removePeer(p policy.PeerKey) error {
	if !p.Exact {
		blocks, err := w.m(bpf.DatapathMapBlocks)
		if err != nil {
			return err
		}
		key := blockKey(p.Prefix)
		return remove(blocks, &key)
	}
	return w.declassify(p.Prefix.Addr())
}

func (w *writer) turnAll() {
	for e, err := range w.Endpoints() {
		if err != nil {
			w.problem(err)
			continue
		}
		if subject, ok := w.a.subjects[e.Pod]; ok {
			w.problem(w.turn(e, subject))
		}
	}
}

// turn makes an endpoint's gate enforce what its subject says.
func (w *writer) turn(e Endpoint, subject bpf.DatapathPod) error {
	turned, err := w.enforceOn(e, subject)
	if turned {
		w.done.Gates++
	}
	return err
}

func (s *State) enforceOn(e Endpoint, subject bpf.DatapathPod) (bool, error) {
	sh, err := s.memory()
	if err != nil {
		return false, err
	}
	if e.Gate >= uint32(len(sh.gates)) || sh.gates[e.Gate].Endpoint != e.ID {
		return false, fmt.Errorf("endpoint %s: %w: gate %d is not its own", e.Key, ErrDiffers, e.Gate)
	}
	want := Enforcement{subject.Rulesets.Ingress, subject.Rulesets.Egress}
	flags := e.flags() | subject.Flags&uint16(bpf.DatapathGateFlagsGATE_AUDIT)
	if sh.enforcement(e.Gate) == want && sh.gates[e.Gate].Flags == flags {
		return false, nil
	}
	// Where either the old or the new state is audited, so is what is between.
	sh.setFlags(e.Gate, flags|sh.gates[e.Gate].Flags)
	sh.enforce(e.Gate, want)
	sh.setFlags(e.Gate, flags)
	return true, nil
}

// Bind makes an endpoint follow a pod: for runtimes that do not name the pod
// by the key its manifest has. It returns [ErrNotFound] if there is no such
// endpoint.
func (s *State) Bind(ctx context.Context, k AttachmentKey, pod policy.PodKey) error {
	return s.locked(ctx, func() error {
		e, _, err := s.Endpoint(k)
		if err != nil {
			return err
		}
		if e.Pod == pod {
			return nil
		}
		e.Pod = pod
		if err := s.record(&e); err != nil {
			return err
		}
		published, found, err := s.published(pod)
		if err != nil || !found {
			return err
		}
		if err := s.classify(pod, published.Class, e.Addresses); err != nil {
			return err
		}
		if _, err := s.enforceOn(e, published); err != nil {
			return err
		}
		return s.addressesMoved()
	})
}

// SetNodeAddresses tells which addresses are this node's: pods may always
// reach them.
func (s *State) SetNodeAddresses(ctx context.Context, addrs []netip.Addr) error {
	return s.locked(ctx, func() error {
		peers, err := s.m(bpf.DatapathMapPeers)
		if err != nil {
			return err
		}
		want := map[netip.Addr]struct{}{}
		for _, a := range addrs {
			want[a.Unmap().WithZone("")] = struct{}{}
		}
		have, err := dump[bpf.DatapathAddress, bpf.DatapathPeer](peers)
		if err != nil {
			return err
		}
		if s.applied != nil {
			s.applied.nodes = want
		}
		var errs []error
		var moved []policy.PeerKey
		for w, p := range have {
			if _, ok := want[unwire(w)]; ok || p.Class&peerNode == 0 {
				continue
			}
			errs = append(errs, s.unmark(unwire(w), peerNode))
			moved = append(moved, exactKey(unwire(w)))
		}
		for a := range want {
			errs = append(errs, s.mark(a, peerNode))
			moved = append(moved, exactKey(a))
		}
		if err := errors.Join(append(errs, s.addressesMoved(), s.rechoose(moved))...); err != nil {
			return err
		}
		s.shared.knowNodes(time.Now())
		return nil
	})
}
