// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package pinning

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync/atomic"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/podgate/podgate/bpf"
	"github.com/podgate/podgate/bpf/policy"
)

// AddRequest is what ADD knows of a new endpoint. ID, Gate, Created and the
// endpoint's actual Attach are not read.
type AddRequest struct {
	Endpoint
	// Bridge is the number of the interface that HostIfindex is a port of, 0 if
	// of none. Its addresses may be the node's newest, and Gateways too, those
	// of the pod, where they are the node's at all.
	Bridge   int
	Gateways []netip.Addr
	// Attach is the wanted kind.
	Attach AttachKind
	// Wait bounds how long Add waits for the policy of the pod to be known.
	Wait time.Duration
}

// Add gates an endpoint: when it returns without an error both hooks are
// attached and the gate enforces the pod's published policy, or is what its
// mode says. An endpoint that is there already is replaced, on the same
// interface without a moment in which packets meet no hook. On an error nothing
// of it is left.
//
// The hooks are attached without the lock: the kernel makes who attaches wait
// for all CPUs, and nobody else touches the interface.
func (s *State) Add(ctx context.Context, r AddRequest) (Endpoint, Enforcement, error) {
	var e Endpoint
	var forebears []*Endpoint
	err := s.locked(ctx, func() (err error) {
		if forebears, err = s.succeed(&r); err != nil {
			return fmt.Errorf("replace endpoint %s: %w", r.Key, err)
		}
		if e, err = s.add(r, forebears); err != nil {
			errs := []error{err, s.delete(r.Key)}
			for _, f := range forebears {
				errs = append(errs, s.unhook(f))
			}
			return errors.Join(errs...)
		}
		return nil
	})
	if err != nil {
		return Endpoint{}, Enforcement{}, err
	}
	if e.Attach, err = s.attach(e.ID, e.HostIfindex, r.Attach); err == nil && len(forebears) > 0 {
		err = s.detachOther(&e)
	}
	if err == nil {
		err = s.locked(ctx, func() error { return s.confirm(&e) })
	}
	if err != nil {
		undo := s.locked(ctx, func() error { return s.undo(&e) })
		return Endpoint{}, Enforcement{}, errors.Join(err, undo)
	}
	return e, s.await(ctx, e, r.Wait), nil
}

// confirm records how an endpoint is attached, unless it was deleted meanwhile.
func (s *State) confirm(e *Endpoint) error {
	if now, _, err := s.Endpoint(e.Key); err != nil {
		return err
	} else if now.ID != e.ID {
		return fmt.Errorf("endpoint %s: %w: another ADD replaced it", e.Key, ErrDiffers)
	}
	if err := s.record(e); err != nil {
		return err
	}
	return s.changed()
}

// undo removes an endpoint whose ADD failed after its gate was made. One that
// somebody deleted or replaced meanwhile has left its hooks behind.
func (s *State) undo(e *Endpoint) error {
	now, _, err := s.Endpoint(e.Key)
	if err == nil && now.ID == e.ID {
		return s.delete(e.Key)
	}
	if err != nil && !errors.Is(err, ErrNotFound) {
		return err
	}
	return s.unhook(e)
}

func (s *State) add(r AddRequest, forebears []*Endpoint) (Endpoint, error) {
	e := r.Endpoint
	sh, err := s.memory()
	if err != nil {
		return e, err
	}
	if err := sh.settleIn(); err != nil {
		return e, err
	}
	if e.Gate, _, err = sh.slotFor(uint32(e.HostIfindex)); err != nil {
		return e, err
	}
	e.ID = atomic.AddUint32(&sh.state.NextEndpoint, 1)
	e.Pod = e.podKey()
	e.Created = time.Now()
	// Recorded before anything else: DEL finds what a dying ADD leaves.
	e.Attach = AttachAuto
	if err := s.record(&e); err != nil {
		return e, err
	}
	if err := s.inherit(&e, forebears); err != nil {
		return e, err
	}
	if err := s.learnNodeAddresses(&r); err != nil {
		return e, err
	}
	return e, s.settle(sh, &e)
}

// settle makes what is known of the addresses of an endpoint, and its gate.
func (s *State) settle(sh *shared, e *Endpoint) error {
	if err := s.claim(e.Key, e.ID, e.Gate, e.Addresses); err != nil {
		return err
	}
	if err := s.setSources(e.ID, e.Addresses, true); err != nil {
		return err
	}
	published, found, err := s.published(e.Pod)
	if err != nil {
		return err
	}
	if err := s.classify(e.Pod, published.Class, e.Addresses); err != nil {
		return err
	}
	return s.openGate(sh, e, published, found)
}

// openGate publishes the gate; the hooks come after it.
func (s *State) openGate(sh *shared, e *Endpoint, pod bpf.DatapathPod, found bool) error {
	counters, err := s.m(bpf.DatapathMapEndpointCounters)
	if err != nil {
		return err
	}
	zero, err := zeroes[bpf.DatapathEndpointCounters]()
	if err != nil {
		return err
	}
	if err := counters.Put(e.Gate, zero); err != nil {
		return fmt.Errorf("%s: %w", counters, err)
	}
	enforced, flags := e.Mode.enforcement(), e.flags()
	if found {
		enforced = Enforcement{pod.Rulesets.Ingress, pod.Rulesets.Egress}
		flags |= pod.Flags & uint16(bpf.DatapathGateFlagsGATE_AUDIT)
	}
	g := bpf.DatapathGate{
		Rulesets: bpf.DatapathEnforcement{Ingress: enforced.Ingress, Egress: enforced.Egress},
		Ifindex:  uint32(e.HostIfindex), Endpoint: e.ID, Flags: flags,
	}
	copy(g.Mac[:], e.MAC)
	g.Own = ownAddresses(e.Addresses)
	sh.publish(e.Gate, g)
	sh.bumpEpoch()
	return nil
}

// zeroes is a value for each CPU.
func zeroes[V any]() ([]V, error) {
	n, err := ebpf.PossibleCPU()
	if err != nil {
		return nil, fmt.Errorf("count CPUs: %w", err)
	}
	return make([]V, n), nil
}

func (s *State) record(e *Endpoint) error {
	key, err := e.Key.wire()
	if err != nil {
		return err
	}
	w, err := e.wire()
	if err != nil {
		return fmt.Errorf("endpoint %s: %w", e.Key, err)
	}
	m, err := s.m(bpf.DatapathMapEndpoints)
	if err != nil {
		return err
	}
	return put(m, &key, w)
}

// published reads the policy of a pod. The value may be another's while its
// map element is being recycled; the tag tells.
func (s *State) published(pod policy.PodKey) (v bpf.DatapathPod, found bool, err error) {
	key, err := podWire(pod)
	if err != nil {
		return v, false, err
	}
	m, err := s.m(bpf.DatapathMapPods)
	if err != nil {
		return v, false, err
	}
	for range 100 {
		if err := m.Lookup(&key, &v); errors.Is(err, ebpf.ErrKeyNotExist) {
			return bpf.DatapathPod{}, false, nil
		} else if err != nil {
			return v, false, fmt.Errorf("policy of pod %s: %w", pod, err)
		}
		if v.Tag == podTag(pod) {
			return v, true, nil
		}
	}
	return bpf.DatapathPod{}, false, nil
}

// await polls the gate and the published policy, not the daemon, until the
// policy is known. The daemon may also turn the gate to a pod of another key.
func (s *State) await(ctx context.Context, e Endpoint, wait time.Duration) Enforcement {
	deadline := time.Now().Add(wait)
	for {
		enforced := s.shared.enforcement(e.Gate)
		published, found, err := s.published(e.Pod)
		// The daemon publishes a policy before it turns the gates to it.
		turned := enforced == Enforcement{published.Rulesets.Ingress, published.Rulesets.Egress}
		known := found && turned || enforced != e.Mode.enforcement()
		if known || err != nil || !time.Now().Before(deadline) {
			return enforced
		}
		select {
		case <-ctx.Done():
			return enforced
		case <-time.After(2 * time.Millisecond):
		}
	}
}

// changed tells the daemon, through the file system, that endpoints changed.
// bpffs reports a change of times like any other file system.
func (s *State) changed() error {
	sh, err := s.memory()
	if err != nil {
		return err
	}
	atomic.AddUint32(&sh.state.Generation, 1)
	if s.private {
		return nil
	}
	now := time.Now()
	if err := os.Chtimes(s.layout.VersionDir(), now, now); err != nil {
		// The daemon also looks at the generation now and then.
		s.log.Debug("notify", "error", err)
	}
	return nil
}

// Delete ends an attachment: the hooks, gate, addresses and record of each of
// its endpoints. It returns nil when there is none.
func (s *State) Delete(ctx context.Context, k AttachmentKey) error {
	return s.locked(ctx, func() error {
		keys, err := s.endpointsOf(k)
		if err != nil {
			return err
		}
		var errs []error
		for _, key := range keys {
			if err := s.delete(key); err != nil {
				errs = append(errs, fmt.Errorf("endpoint %s: %w", key, err))
			}
		}
		return errors.Join(append(errs, s.changed())...)
	})
}

// endpointsOf lists the endpoints of an attachment: its own interface and
// those that came with it. They are looked for among all endpoints unless the
// record says that there are none.
func (s *State) endpointsOf(k AttachmentKey) ([]AttachmentKey, error) {
	e, err := s.find(k)
	if err != nil || e != nil && e.Interfaces == 1 {
		return []AttachmentKey{k}, err
	}
	m, err := s.m(bpf.DatapathMapEndpoints)
	if err != nil {
		return nil, err
	}
	all, err := keysOf[bpf.DatapathAttachment](m)
	if err != nil {
		return nil, err
	}
	own := []AttachmentKey{k}
	for i := range all {
		other := attachmentKey(&all[i])
		if other.ContainerID != k.ContainerID || other == k {
			continue
		}
		var w bpf.DatapathEndpoint
		if err := m.Lookup(&all[i], &w); err == nil && text(w.CniIfname[:]) == k.IfName {
			own = append(own, other)
		}
	}
	return own, nil
}

func (s *State) delete(k AttachmentKey) error {
	e, err := s.find(k)
	if err != nil || e == nil {
		return err
	}
	return s.end(e)
}

// find reads a record, or nil if there is none. One that cannot be read whole
// still names what to clean.
func (s *State) find(k AttachmentKey) (*Endpoint, error) {
	key, err := k.wire()
	if err != nil {
		return nil, err
	}
	m, err := s.m(bpf.DatapathMapEndpoints)
	if err != nil {
		return nil, err
	}
	var w bpf.DatapathEndpoint
	if err := m.Lookup(&key, &w); errors.Is(err, ebpf.ErrKeyNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf("%s: %w", m, err)
	}
	e, err := unwireEndpoint(&key, &w)
	if err != nil {
		s.log.Warn("broken record", "error", err)
	}
	return &e, nil
}

// end takes an endpoint away, its record last.
func (s *State) end(e *Endpoint) error {
	if err := s.shut(e); err != nil {
		return err
	}
	if err := errors.Join(s.unhook(e), s.disown(e)); err != nil {
		return err
	}
	return s.forget(e.Key)
}

// shut retracts the gate: from here on the interface is closed.
func (s *State) shut(e *Endpoint) error {
	sh, err := s.memory()
	if err != nil {
		return err
	}
	if e.Gate < uint32(len(sh.gates)) && sh.gates[e.Gate].Endpoint == e.ID {
		sh.retract(e.Gate)
	}
	return nil
}

// unhook detaches both kinds: an ADD that died may have left either. An
// interface whose gate is another's is not ours any more.
func (s *State) unhook(e *Endpoint) error {
	sh, err := s.memory()
	if err != nil {
		return err
	}
	errs := []error{s.detachTCX(e.ID)}
	if _, taken, err := sh.slotFor(uint32(e.HostIfindex)); err == nil && !taken {
		errs = append(errs, detachClsact(e.HostIfindex))
	}
	return errors.Join(errs...)
}

// disown ends what is known of the addresses of an endpoint.
func (s *State) disown(e *Endpoint) error {
	errs := []error{s.setSources(e.ID, e.Addresses, false)}
	if len(e.Addresses) > 0 {
		errs = append(errs, s.release(e.Key, e.Addresses))
	}
	return errors.Join(append(errs, s.addressesMoved())...)
}

func (s *State) forget(k AttachmentKey) error {
	key, err := k.wire()
	if err != nil {
		return err
	}
	m, err := s.m(bpf.DatapathMapEndpoints)
	if err != nil {
		return err
	}
	return remove(m, &key)
}

// GC removes the endpoints of a network whose attachments are not in keep. It
// goes on after errors and returns them joined.
func (s *State) GC(ctx context.Context, network string, keep map[AttachmentKey]struct{}) ([]AttachmentKey, error) {
	var removed []AttachmentKey
	err := s.locked(ctx, func() error {
		var errs []error
		for e, err := range s.Endpoints() {
			_, kept := keep[e.attachment()]
			if e.Key == (AttachmentKey{}) || kept || e.Network != network {
				if err != nil {
					errs = append(errs, err)
				}
				continue
			}
			// A record that cannot be read whole still names what to clean.
			if err := s.delete(e.Key); err != nil {
				errs = append(errs, fmt.Errorf("endpoint %s: %w", e.Key, err))
				continue
			}
			removed = append(removed, e.Key)
		}
		return errors.Join(append(errs, s.changed())...)
	})
	return removed, err
}

// Ready says whether Add would work: the instance is there and has room. It
// changes nothing.
func (s *State) Ready(_ context.Context) error {
	for _, name := range programNames() {
		if _, err := s.program(name); err != nil {
			return err
		}
	}
	for _, name := range []string{
		bpf.DatapathMapEndpoints, bpf.DatapathMapPods, bpf.DatapathMapPeers, bpf.DatapathMapClaims,
		bpf.DatapathMapSources, bpf.DatapathMapFlows,
	} {
		if _, err := s.m(name); err != nil {
			return err
		}
	}
	sh, err := s.memory()
	if err != nil {
		return err
	}
	used := uint32(0)
	for i := range sh.gates {
		if atomic.LoadUint32(&sh.gates[i].Ifindex) != 0 {
			used++
		}
	}
	if most := s.opened[bpf.DatapathMapEndpoints].MaxEntries(); used >= most {
		return fmt.Errorf("%w: %d of %d endpoints", ErrFull, used, most)
	}
	return s.servicesAttached()
}

// Check compares an endpoint with what is in the kernel and returns
// [ErrNotFound] or [ErrDiffers] with the first thing that is not as Add left
// it. Fields of want that are zero are not compared.
func (s *State) Check(_ context.Context, k AttachmentKey, want Endpoint) error {
	e, _, err := s.Endpoint(k)
	if err != nil {
		return err
	}
	sh, err := s.memory()
	if err != nil {
		return err
	}
	if g := sh.gates[e.Gate]; g.Ifindex != uint32(e.HostIfindex) {
		return fmt.Errorf("endpoint %s: %w: its gate is for interface %d, not %d", k, ErrDiffers, g.Ifindex, e.HostIfindex)
	}
	if want.HostIfindex != 0 && want.HostIfindex != e.HostIfindex {
		return fmt.Errorf("endpoint %s: %w: its host interface is %d, not %d", k, ErrDiffers, want.HostIfindex, e.HostIfindex)
	}
	if len(want.MAC) != 0 && want.MAC.String() != e.MAC.String() && e.AntiSpoof {
		return fmt.Errorf("endpoint %s: %w: its MAC address is %s, not %s", k, ErrDiffers, want.MAC, e.MAC)
	}
	claims, err := s.m(bpf.DatapathMapClaims)
	if err != nil {
		return err
	}
	for _, a := range want.Addresses {
		if a.IsLinkLocalUnicast() {
			continue
		}
		w := wire(a)
		var c bpf.DatapathClaim
		if err := claims.Lookup(&w, &c); err != nil || attachmentKey(&c.Attachment) != k {
			return fmt.Errorf("endpoint %s: %w: address %s is not claimed by it", k, ErrDiffers, a)
		}
	}
	if err := errors.Join(s.attached(e), s.servicesAttached()); err != nil {
		return fmt.Errorf("endpoint %s: %w", k, err)
	}
	return nil
}

func podWire(k policy.PodKey) (bpf.DatapathPodKey, error) {
	var w bpf.DatapathPodKey
	return w, setText(w.Id[:], "pod key", string(k))
}

// podTag is non-zero, so that a value not written yet is no pod's.
func podTag(k policy.PodKey) uint64 {
	h := uint64(14695981039346656037)
	for i := range len(k) {
		h = (h ^ uint64(k[i])) * 1099511628211
	}
	return h | 1
}

// isFull: the kernel has no room in a map.
func isFull(err error) bool {
	return errors.Is(err, unix.E2BIG) || errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.ENOMEM)
}
