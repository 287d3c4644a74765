// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package pinning

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/podgate/podgate/bpf"
	"github.com/podgate/podgate/bpf/policy"
)

// Service is one port of a Service, as kube-proxy translates it on this node.
type Service struct {
	// Namespace, Name and PortName are for people. PortName may be empty.
	Namespace, Name, PortName string
	// Protocol is TCP, UDP or SCTP.
	Protocol policy.Protocol
	// Frontends are where pods reach it: cluster addresses, external ones,
	// those of load balancers, and node ports at this node's addresses.
	Frontends []netip.AddrPort
	// Backends are what a packet to a frontend may be translated to: pod or
	// node addresses with their target ports. None: nothing is translated, and
	// the frontends are judged as the addresses they are.
	Backends []netip.AddrPort
}

func (v *Service) String() string {
	if v.PortName == "" {
		return v.Namespace + "/" + v.Name
	}
	return v.Namespace + "/" + v.Name + ":" + v.PortName
}

func (v *Service) validate() error {
	switch v.Protocol {
	case policy.TCP, policy.UDP, policy.SCTP:
	default:
		return fmt.Errorf("%w: protocol %d", ErrInvalid, v.Protocol)
	}
	for what, list := range map[string][]netip.AddrPort{"frontend": v.Frontends, "backend": v.Backends} {
		for _, a := range list {
			if !a.IsValid() || a.Port() == 0 {
				return fmt.Errorf("%w: %s %q is no address with a port", ErrInvalid, what, a)
			}
		}
	}
	return nil
}

// services is the writer's picture of what is pinned of Services.
type services struct {
	// ids of services by the digest of their pinned entry.
	ids *ids
	// choices by service.
	choices map[uint32][]choice
	// frontends as pinned.
	frontends map[bpf.DatapathFrontendKey]uint32
	// marked are the addresses with PEER_SERVICE.
	marked map[netip.Addr]struct{}
	// wanted are the Services of the last SetServices of this process, leads
	// where each frontend leads, uses how many lead to a number.
	wanted []wantedService
	leads  map[bpf.DatapathFrontendKey]int32
	uses   map[uint32]int
	// backends are where a wanted Service has one, more where others have too.
	backends map[netip.Addr]int32
	more     map[netip.Addr][]int32
}

// serve notes that a wanted Service has a backend at an address.
func (t *services) serve(a netip.Addr, i int32) {
	switch first, ok := t.backends[a]; {
	case !ok:
		t.backends[a] = i
	case first != i && !slices.Contains(t.more[a], i):
		t.more[a] = append(t.more[a], i)
	}
}

// leave undoes serve.
func (t *services) leave(a netip.Addr, i int32) {
	if first, ok := t.backends[a]; ok && first != i {
		if t.more[a] = slices.DeleteFunc(t.more[a], func(j int32) bool { return j == i }); len(t.more[a]) == 0 {
			delete(t.more, a)
		}
		return
	}
	delete(t.backends, a)
	if rest := t.more[a]; len(rest) > 0 {
		t.backends[a] = rest[0]
		if t.more[a] = rest[1:]; len(rest) == 1 {
			delete(t.more, a)
		}
	}
}

// at adds the wanted Services that have a backend at an address.
func (t *services) at(a netip.Addr, to map[int32]struct{}) {
	if first, ok := t.backends[a]; ok {
		to[first] = struct{}{}
		for _, i := range t.more[a] {
			to[i] = struct{}{}
		}
	}
}

// wantedService is a Service with the number it is pinned under; 0: it has
// found no room.
type wantedService struct {
	Service
	id uint32
}

// choice is a set of backends that policy cannot tell apart.
type choice struct {
	class uint32
	port  uint16
}

// serviceChoices is SERVICE_CHOICES of bpf/include/types.h.
const serviceChoices = len(bpf.DatapathService{}.Choices)

// serviceTable reads back what is pinned, once in a process.
func (s *State) serviceTable() (*services, error) {
	if s.services != nil {
		return s.services, nil
	}
	frontends, err := s.m(bpf.DatapathMapFrontends)
	if err != nil {
		return nil, err
	}
	table, err := s.m(bpf.DatapathMapServices)
	if err != nil {
		return nil, err
	}
	t := &services{
		ids:       newIDs("services", 1, table.MaxEntries()),
		choices:   map[uint32][]choice{},
		frontends: map[bpf.DatapathFrontendKey]uint32{},
		marked:    map[netip.Addr]struct{}{},
	}
	pinned, err := dump[uint32, bpf.DatapathService](table)
	if err != nil {
		return nil, err
	}
	for id, v := range pinned {
		t.ids.adopt(v.Digest.Bytes, id)
		t.choices[id] = choicesOf(&v)
	}
	leads, err := dump[bpf.DatapathFrontendKey, bpf.DatapathFrontend](frontends)
	if err != nil {
		return nil, err
	}
	for k, v := range leads {
		t.frontends[k] = v.Service
	}
	peers, err := s.m(bpf.DatapathMapPeers)
	if err != nil {
		return nil, err
	}
	classes, err := dump[bpf.DatapathAddress, bpf.DatapathPeer](peers)
	if err != nil {
		return nil, err
	}
	for a, p := range classes {
		if p.Class&peerService != 0 {
			t.marked[unwire(a)] = struct{}{}
		}
	}
	s.services = t
	return t, nil
}

func choicesOf(v *bpf.DatapathService) []choice {
	var out []choice
	for _, c := range v.Choices[:min(int(v.Count), serviceChoices)] {
		out = append(out, choice{c.Class, c.Port})
	}
	return out
}

// SetServices tells the Services there are; it replaces what it was told
// before, by this process or a former one. What policy allows is the backend.
// Where the kernel can have a program behind DNAT, that judges the one that
// was chosen. Elsewhere, and under IPVS, a packet to a frontend is allowed when
// it is allowed to each of its backends, and denied with a reason of its own
// when only to some. It is called in the node's network namespace, and returns
// [ErrNetNS] elsewhere.
//
// What cannot be stored is returned in a joined error, [ErrFull] or
// [ErrInvalid], with the name of the Service; its frontends are judged as the
// addresses they are, and the others are in force.
func (s *State) SetServices(ctx context.Context, all []Service) error {
	if len(all) > 0 {
		s.prepareServices()
	}
	return s.locked(ctx, func() error {
		if err := s.atHome(); err != nil {
			return err
		}
		t, err := s.serviceTable()
		if err != nil {
			return err
		}
		w := &serviceWriter{State: s, t: t, frontends: map[bpf.DatapathFrontendKey]uint32{}, names: map[uint32]Service{}}
		return w.set(all)
	})
}

// MoveBackends replaces the backends of Services that [State.SetServices] has
// been told of by this process, and that have the same frontends as then. It
// costs what has changed. [ErrNotFound] says that one is not known, or has found
// no room before: then all have to be told anew.
func (s *State) MoveBackends(ctx context.Context, moved []Service) error {
	if len(moved) == 0 {
		return nil
	}
	return s.locked(ctx, func() error {
		t, err := s.serviceTable()
		if err != nil {
			return err
		}
		if err := s.sweepServices(); err != nil {
			return err
		}
		touched := map[int32]struct{}{}
		for _, v := range moved {
			if err := v.validate(); err != nil {
				return fmt.Errorf("service %s: %w", &v, err)
			}
			if len(v.Frontends) == 0 {
				continue
			}
			i, ok := t.leads[frontendKey(v.Frontends[0], v.Protocol)]
			if !ok || !slices.Equal(t.wanted[i].Frontends, v.Frontends) {
				return fmt.Errorf("service %s: %w", &v, ErrNotFound)
			}
			for _, b := range t.wanted[i].Backends {
				t.leave(b.Addr().Unmap(), i)
			}
			for _, b := range v.Backends {
				t.serve(b.Addr().Unmap(), i)
			}
			t.wanted[i].Backends = v.Backends
			touched[i] = struct{}{}
		}
		return s.choose(touched)
	})
}

// serviceWriter is one SetServices.
type serviceWriter struct {
	*State
	t *services
	// frontends as they are to be.
	frontends map[bpf.DatapathFrontendKey]uint32
	// names are the Services by number.
	names    map[uint32]Service
	problems []error
}

func (w *serviceWriter) problem(v *Service, err error) {
	if err != nil {
		w.problems = append(w.problems, fmt.Errorf("service %s: %w", v, err))
	}
}

func (w *serviceWriter) set(all []Service) error {
	if err := w.sweepServices(); err != nil {
		return err
	}
	if err := w.chooseMode(len(all) > 0); err != nil {
		return err
	}
	w.t.wanted, w.t.backends, w.t.more = nil, map[netip.Addr]int32{}, map[netip.Addr][]int32{}
	w.t.leads, w.t.uses = map[bpf.DatapathFrontendKey]int32{}, map[uint32]int{}
	for _, v := range all {
		if err := v.validate(); err != nil {
			w.problem(&v, err)
			continue
		}
		wanted := wantedService{Service: v}
		var err error
		if wanted.id, err = w.writeService(&v); err != nil {
			w.problem(&v, err)
			continue
		}
		for _, b := range v.Backends {
			w.t.serve(b.Addr().Unmap(), int32(len(w.t.wanted)))
		}
		w.t.wanted = append(w.t.wanted, wanted)
		w.names[wanted.id] = v
		for _, f := range v.Frontends {
			key := frontendKey(f, v.Protocol)
			if _, dup := w.frontends[key]; dup {
				w.problem(&v, fmt.Errorf("%w: another Service has frontend %s", ErrInvalid, f))
				continue
			}
			w.frontends[key] = wanted.id
			w.t.leads[key] = int32(len(w.t.wanted) - 1)
		}
		w.t.uses[wanted.id]++
	}
	changed, err := w.publish()
	if err != nil {
		return err
	}
	w.retireServices()
	if changed {
		err = w.addressesMoved()
	}
	return errors.Join(append(w.problems, err)...)
}

// chooseMode says when Services are judged, before the first frontend is there.
// It stays when the last one goes: connections outlive their Service.
func (w *serviceWriter) chooseMode(any bool) error {
	if !any {
		return nil
	}
	return w.judgeServices()
}

// publish makes frontends lead to the Services of now. An address is marked
// after its first frontend is there and until its last one is gone.
func (w *serviceWriter) publish() (changed bool, err error) {
	m, err := w.m(bpf.DatapathMapFrontends)
	if err != nil {
		return false, err
	}
	marked := map[netip.Addr]struct{}{}
	for key, id := range w.frontends {
		if now, has := w.t.frontends[key]; !has || now != id {
			if err := put(m, &key, &bpf.DatapathFrontend{Service: id, Tag: frontendTag(key)}); err != nil {
				v := w.names[id]
				w.problem(&v, fmt.Errorf("frontend %s: %w", frontendOf(key), err))
				continue
			}
			w.t.frontends[key] = id
			changed = true
		}
		marked[unwire(key.Address)] = struct{}{}
	}
	moved, err := w.markFrontends(marked)
	if err != nil {
		return changed, err
	}
	for key := range w.t.frontends {
		if _, stays := w.frontends[key]; stays {
			continue
		}
		if err := remove(m, &key); err != nil {
			return changed, err
		}
		delete(w.t.frontends, key)
		changed = true
	}
	return changed || moved, nil
}

// markFrontends gives the addresses of frontends, and no others, PEER_SERVICE.
func (w *serviceWriter) markFrontends(want map[netip.Addr]struct{}) (changed bool, err error) {
	for a := range want {
		if _, has := w.t.marked[a]; has {
			continue
		}
		if err := w.mark(a, peerService); err != nil {
			w.problems = append(w.problems, fmt.Errorf("service address %s: %w", a, err))
			continue
		}
		w.t.marked[a] = struct{}{}
		changed = true
	}
	for a := range w.t.marked {
		if _, stays := want[a]; stays {
			continue
		}
		delete(w.t.marked, a)
		if err := w.unmark(a, peerService); err != nil {
			return changed, err
		}
		changed = true
	}
	return changed, nil
}

// writeService pins a Service with what policy can tell of its backends, under
// a number that nothing leads to yet unless it is there already.
func (s *State) writeService(v *Service) (uint32, error) {
	e, err := s.serviceEntry(v)
	if err != nil {
		return 0, err
	}
	m, err := s.m(bpf.DatapathMapServices)
	if err != nil {
		return 0, err
	}
	t := s.services
	id, isNew, err := t.ids.assign(e.Digest.Bytes)
	if err != nil || !isNew {
		return id, err
	}
	e.Id = id
	if err := put(m, &id, e); err != nil {
		t.ids.free(id)
		return 0, err
	}
	t.choices[id] = choicesOf(e)
	return id, nil
}

func (s *State) serviceEntry(v *Service) (*bpf.DatapathService, error) {
	choices, err := s.choices(v.Backends)
	if err != nil {
		return nil, err
	}
	e := &bpf.DatapathService{Count: uint32(len(choices))}
	for i, c := range choices[:min(len(choices), serviceChoices)] {
		e.Choices[i].Class, e.Choices[i].Port = c.class, c.port
	}
	if err := errors.Join(
		setText(e.Namespace[:], "namespace", v.Namespace),
		setText(e.Name[:], "name", v.Name),
		setText(e.PortName[:], "port name", v.PortName)); err != nil {
		return nil, err
	}
	b, err := binary.Append(nil, binary.NativeEndian, e)
	if err != nil {
		return nil, fmt.Errorf("digest: %w", err)
	}
	sum := sha256.Sum256(b)
	copy(e.Digest.Bytes[:], sum[:])
	return e, nil
}

// choices are the backends' classes and ports as the datapath sees them now,
// each once.
func (s *State) choices(backends []netip.AddrPort) ([]choice, error) {
	var out []choice
	for _, b := range backends {
		class, err := s.peerClass(b.Addr().Unmap())
		if err != nil {
			return nil, err
		}
		out = append(out, choice{class &^ peerService, b.Port()})
	}
	slices.SortFunc(out, func(a, b choice) int {
		return cmp.Or(cmp.Compare(a.class, b.class), cmp.Compare(a.port, b.port))
	})
	return slices.Compact(out), nil
}

// rechoose follows backends whose class has changed: those at the peers named.
func (s *State) rechoose(moved []policy.PeerKey) error {
	t, err := s.serviceTable()
	if err != nil {
		return err
	}
	touched := map[int32]struct{}{}
	var blocks []netip.Prefix
	for _, p := range moved {
		if p.Exact {
			t.at(p.Prefix.Addr(), touched)
		} else {
			blocks = append(blocks, p.Prefix)
		}
	}
	if len(blocks) > 0 {
		within := contains(blocks)
		for a := range t.backends {
			if within(a) {
				t.at(a, touched)
			}
		}
	}
	return s.choose(touched)
}

// choose pins wanted Services again, as policy tells their backends now.
func (s *State) choose(touched map[int32]struct{}) error {
	if len(touched) == 0 {
		return nil
	}
	t := s.services
	m, err := s.m(bpf.DatapathMapFrontends)
	if err != nil {
		return err
	}
	changed := false
	var errs []error
	for i := range touched {
		v := &t.wanted[i]
		id, err := s.writeService(&v.Service)
		if err != nil {
			errs = append(errs, fmt.Errorf("service %s: %w", v, err))
			continue
		}
		if id == v.id {
			continue
		}
		whole := true
		for _, f := range v.Frontends {
			key := frontendKey(f, v.Protocol)
			if t.frontends[key] != v.id {
				continue
			}
			if err := put(m, &key, &bpf.DatapathFrontend{Service: id, Tag: frontendTag(key)}); err != nil {
				errs = append(errs, fmt.Errorf("service %s: %w", v, err))
				whole = false
				continue
			}
			t.frontends[key] = id
			changed = true
		}
		t.uses[id]++
		if t.uses[v.id]--; t.uses[v.id] <= 0 && whole {
			delete(t.uses, v.id)
			t.ids.condemn(t.ids.used[v.id], time.Now())
		}
		v.id = id
	}
	if changed {
		errs = append(errs, s.addressesMoved())
	}
	return errors.Join(errs...)
}

// retireServices condemns the numbers that no frontend leads to any more.
func (s *State) retireServices() {
	used := map[uint32]struct{}{}
	for _, id := range s.services.frontends {
		used[id] = struct{}{}
	}
	for i := range s.services.wanted {
		used[s.services.wanted[i].id] = struct{}{}
	}
	now := time.Now()
	for id, d := range s.services.ids.used {
		if _, ok := used[id]; ok {
			continue
		}
		if _, known := s.services.ids.condemned[id]; !known {
			s.services.ids.condemn(d, now)
		}
	}
}

// sweepServices removes what was condemned long enough ago.
func (s *State) sweepServices() error {
	if s.services == nil {
		return nil
	}
	m, err := s.m(bpf.DatapathMapServices)
	if err != nil {
		return err
	}
	for _, id := range s.services.ids.due(time.Now().Add(-grace)) {
		if err := remove(m, &id); err != nil {
			return err
		}
		s.services.ids.free(id)
		delete(s.services.choices, id)
	}
	return nil
}

// chosen are the classes that Services refer to.
func (s *State) chosen() map[uint32]struct{} {
	out := map[uint32]struct{}{}
	if s.services == nil {
		return out
	}
	for _, list := range s.services.choices {
		for _, c := range list {
			out[c.class&^peerBits] = struct{}{}
		}
	}
	return out
}

func frontendKey(f netip.AddrPort, p policy.Protocol) bpf.DatapathFrontendKey {
	return bpf.DatapathFrontendKey{Address: wire(f.Addr().Unmap()), Port: f.Port(), Protocol: uint8(p)}
}

func frontendOf(k bpf.DatapathFrontendKey) netip.AddrPort {
	return netip.AddrPortFrom(unwire(k.Address), k.Port)
}

// frontendTag is frontend_tag of bpf/include/judge.h.
func frontendTag(k bpf.DatapathFrontendKey) uint16 {
	return tag(k.Address) ^ k.Port ^ uint16(k.Protocol)
}

// ServiceAt names the Service with a frontend at an address. It returns
// [ErrNotFound] if there is none.
func (s *State) ServiceAt(f netip.AddrPort, p policy.Protocol) (Service, error) {
	frontends, err := s.m(bpf.DatapathMapFrontends)
	if err != nil {
		return Service{}, err
	}
	var lead bpf.DatapathFrontend
	if err := lookup(frontends, frontendKey(f, p), &lead); err != nil {
		return Service{}, fmt.Errorf("frontend %s: %w", f, err)
	}
	table, err := s.m(bpf.DatapathMapServices)
	if err != nil {
		return Service{}, err
	}
	var v bpf.DatapathService
	if err := lookup(table, lead.Service, &v); err != nil {
		return Service{}, fmt.Errorf("service %d: %w", lead.Service, err)
	}
	return Service{
		Namespace: text(v.Namespace[:]), Name: text(v.Name[:]), PortName: text(v.PortName[:]), Protocol: p,
	}, nil
}
