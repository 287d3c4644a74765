// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package pinning

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"

	"github.com/podgate/podgate/bpf"
)

// A binary of another ABI makes a tree of its own beside the one that is there,
// and takes over from it endpoint by endpoint: [State.Inherit] copies what is
// known of them, the daemon compiles their policy, and [State.TakeOver] swaps
// the hooks. Until then the programs of the other version judge by the policy
// they have. It works both ways: a rollback is an upgrade to another version.

// former is the tree of another ABI.
type former struct{ dir string }

// formers are the trees of other ABIs, if there are any.
func (l Layout) formers() ([]former, error) {
	dirs, err := filepath.Glob(filepath.Join(l.Dir(), "v*"))
	if err != nil {
		return nil, fmt.Errorf("list versions: %w", err)
	}
	var all []former
	for _, dir := range dirs {
		if dir != l.VersionDir() {
			all = append(all, former{dir})
		}
	}
	return all, nil
}

func (f former) m(name string) (*ebpf.Map, error) {
	m, err := loadPin[*ebpf.Map](filepath.Join(f.dir, "maps", name))
	if err != nil {
		return nil, fmt.Errorf("map %s of %s: %w", name, f.dir, err)
	}
	return m, nil
}

// lasting are the maps that a new tree shares with a former one, if their
// layouts are the same: what packets have taught, which nobody could tell anew.
// Their keys have the numbers of endpoints, which are kept.
func lasting() []string {
	return []string{bpf.DatapathMapFlows, bpf.DatapathMapBackends, bpf.DatapathMapFragments, bpf.DatapathMapNeighbours}
}

// heritage is what a tree that is made takes from a former one.
type heritage struct {
	maps  map[string]*ebpf.Map
	state bpf.DatapathState
}

func (h *heritage) close() {
	for _, m := range h.maps {
		_ = m.Close()
	}
}

// Numbers of a tree begin so far behind those of the former one that these never
// meet: what the former may still count up is less.
const (
	endpointLead = 1 << 20
	epochLead    = 1 << 31
)

// heritage looks for the former tree with the most endpoints there ever were,
// which is the latest. What cannot be read is not inherited: flows are judged
// anew then, as if the table had been full.
func (s *State) heritage() (*heritage, error) {
	formers, err := s.layout.formers()
	if err != nil {
		return nil, err
	}
	spec, err := bpf.LoadDatapath()
	if err != nil {
		return nil, fmt.Errorf("read programs: %w", err)
	}
	h := &heritage{maps: map[string]*ebpf.Map{}}
	var latest *former
	for _, f := range formers {
		state, err := f.state(spec)
		if err != nil {
			s.log.Warn("nothing is inherited", "from", f.dir, "error", err)
			continue
		}
		if latest == nil || state.NextEndpoint > h.state.NextEndpoint {
			latest, h.state = &f, state
		}
	}
	if latest == nil {
		return h, nil
	}
	for _, name := range lasting() {
		m, err := latest.m(name)
		if err == nil {
			if err = compatible(spec.Maps[name], m); err == nil {
				h.maps[name] = m
				continue
			}
			_ = m.Close()
		}
		s.log.Warn("a map is not inherited", "map", name, "from", latest.dir, "error", err)
	}
	return h, nil
}

// state reads the one record of a former tree.
func (f former) state(spec *ebpf.CollectionSpec) (bpf.DatapathState, error) {
	var state bpf.DatapathState
	m, err := f.m(bpf.DatapathMapState)
	if err != nil {
		return state, err
	}
	defer func() { _ = m.Close() }()
	t, err := newTranslation(spec.Maps[bpf.DatapathMapState].Value, m)
	if err != nil {
		return state, fmt.Errorf("%s: %w", m, err)
	}
	value, err := m.LookupBytes(uint32(0))
	if err != nil {
		return state, fmt.Errorf("%s: %w", m, err)
	}
	return state, t.into(value, &state)
}

// begin writes where a new tree starts to count.
func (h *heritage) begin(state *ebpf.Map) error {
	if h.state.NextEndpoint == 0 && h.state.Epoch == 0 {
		return nil
	}
	first := bpf.DatapathState{
		NextEndpoint: h.state.NextEndpoint + endpointLead, Epoch: h.state.Epoch + epochLead, Netns: h.state.Netns,
	}
	return state.Put(uint32(0), &first)
}

// heir is an endpoint of a former tree.
type heir struct {
	Endpoint
	key []byte // as the former map has it
}

// endpoints of a former tree. One that cannot be read is an error among others.
func (f former) endpoints(m *ebpf.Map) (all []heir, err error) {
	spec, err := bpf.LoadDatapath()
	if err != nil {
		return nil, fmt.Errorf("read programs: %w", err)
	}
	keys, err := newTranslation(spec.Maps[bpf.DatapathMapEndpoints].Key, m)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", m, err)
	}
	values, err := newTranslation(spec.Maps[bpf.DatapathMapEndpoints].Value, m)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", m, err)
	}
	var errs []error
	var key, value []byte
	for i := m.Iterate(); i.Next(&key, &value); {
		var k bpf.DatapathAttachment
		var w bpf.DatapathEndpoint
		if err := errors.Join(keys.into(key, &k), values.into(value, &w)); err != nil {
			errs = append(errs, err)
			continue
		}
		e, err := unwireEndpoint(&k, &w)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		all = append(all, heir{e, slices.Clone(key)})
	}
	return all, errors.Join(errs...)
}

// Inherit makes records and gates of the endpoints that other versions have, and
// that are not here yet. Their hooks stay as they are. It returns whether another
// version is there, for [State.TakeOver], goes on after errors and returns them
// joined.
func (s *State) Inherit(ctx context.Context) (there bool, err error) {
	formers, err := s.layout.formers()
	if err != nil || len(formers) == 0 {
		return false, err
	}
	if err := s.atHome(); err != nil {
		return true, err
	}
	err = s.locked(ctx, func() error {
		var errs []error
		for _, f := range formers {
			if err := s.inheritFrom(f); err != nil {
				errs = append(errs, fmt.Errorf("inherit from %s: %w", f.dir, err))
			}
		}
		return errors.Join(errs...)
	})
	return true, err
}

func (s *State) inheritFrom(f former) error {
	m, err := f.m(bpf.DatapathMapEndpoints)
	if errors.Is(err, ErrNotInstalled) {
		return nil // Its removal was interrupted.
	}
	if err != nil {
		return err
	}
	defer func() { _ = m.Close() }()
	heirs, err := f.endpoints(m)
	errs := []error{err}
	for _, h := range heirs {
		if err := s.inheritEndpoint(h.Endpoint); err != nil {
			errs = append(errs, fmt.Errorf("endpoint %s: %w", h.Key, err))
		}
	}
	return errors.Join(errs...)
}

// inheritEndpoint leaves out one whose place is taken, or that is gone.
func (s *State) inheritEndpoint(e Endpoint) error {
	if _, err := netlink.LinkByIndex(e.HostIfindex); isNoLink(err) {
		return nil
	} else if err != nil {
		return fmt.Errorf("interface %d: %w", e.HostIfindex, err)
	}
	if known, err := s.find(e.Key); err != nil || known != nil {
		return err
	}
	if other, err := s.gated(e.HostIfindex); err != nil || other != nil {
		return err
	}
	sh, err := s.memory()
	if err != nil {
		return err
	}
	if e.Gate, _, err = sh.slotFor(uint32(e.HostIfindex)); err != nil {
		return err
	}
	e.Attach = AttachFormer
	if err := s.record(&e); err != nil {
		return err
	}
	if err := s.settle(sh, &e); err != nil {
		return errors.Join(err, s.shut(&e), s.disown(&e), s.forget(e.Key))
	}
	return s.changed()
}

// TakeOver swaps the hooks of inherited endpoints whose policy is known, and
// removes the trees of other versions that have none left. It returns whether
// one has. The caller has to have applied all that it
// knows, Services and the node's addresses too: from here on it decides.
func (s *State) TakeOver(ctx context.Context) (there bool, err error) {
	formers, err := s.layout.formers()
	if err != nil || len(formers) == 0 {
		return false, err
	}
	if err := s.atHome(); err != nil {
		return true, err
	}
	err = s.locked(ctx, func() error {
		var errs []error
		for _, f := range formers {
			waiting, err := s.takeOverFrom(f)
			if err == nil && waiting == 0 {
				s.log.Info("the state of another version was taken over", "from", f.dir)
				err = f.remove()
			} else {
				there = true
			}
			if err != nil {
				errs = append(errs, fmt.Errorf("take over from %s: %w", f.dir, err))
			}
		}
		return errors.Join(errs...)
	})
	return there || err != nil, err
}

func (s *State) takeOverFrom(f former) (waiting int, err error) {
	m, err := f.m(bpf.DatapathMapEndpoints)
	if errors.Is(err, ErrNotInstalled) {
		return 0, nil // Its removal was interrupted.
	}
	if err != nil {
		return 0, err
	}
	defer func() { _ = m.Close() }()
	heirs, err := f.endpoints(m)
	errs := []error{err}
	for _, h := range heirs {
		done, err := s.takeOver(f, h.Endpoint)
		if err != nil {
			errs = append(errs, fmt.Errorf("endpoint %s: %w", h.Key, err))
		}
		if !done || err != nil {
			waiting++
			continue
		}
		if err := m.Delete(h.key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			errs = append(errs, fmt.Errorf("%s: %w", m, err))
		}
	}
	return waiting, errors.Join(errs...)
}

// takeOver swaps the hooks of an endpoint that was inherited; it returns false
// while its policy is not known. One that is gone, or whose interface has another
// gate by now, needs nothing.
func (s *State) takeOver(f former, theirs Endpoint) (bool, error) {
	if _, err := netlink.LinkByIndex(theirs.HostIfindex); isNoLink(err) {
		return true, nil
	} else if err != nil {
		return false, fmt.Errorf("interface %d: %w", theirs.HostIfindex, err)
	}
	e, err := s.find(theirs.Key)
	if err != nil {
		return false, err
	}
	if e == nil {
		// Its ADD came after Inherit, or its DEL; the next time tells.
		other, err := s.gated(theirs.HostIfindex)
		return other != nil, err
	}
	if e.Attach != AttachFormer {
		return true, nil
	}
	published, found, err := s.published(e.Pod)
	if err != nil {
		return false, err
	}
	enforced, err := s.Enforcement(*e)
	if err != nil {
		return false, err
	}
	if !found || enforced != (Enforcement{published.Rulesets.Ingress, published.Rulesets.Egress}) {
		return false, nil
	}
	// Where the former's own place is taken by its links, ours come before them.
	if e.Attach, err = s.attach(e.ID, e.HostIfindex, theirs.Attach); err != nil {
		return false, err
	}
	if err := s.record(e); err != nil {
		return false, err
	}
	links := filepath.Join(f.dir, "links", fmt.Sprint(theirs.ID))
	if err := os.RemoveAll(links); err != nil {
		return false, fmt.Errorf("unpin links %s: %w", links, err)
	}
	return true, nil
}

// remove takes off what hooks of a former tree are left, and removes it.
func (f former) remove() error {
	gates, err := f.m(bpf.DatapathMapGates)
	if err == nil {
		info, err := gates.Info()
		if err := errors.Join(err, gates.Close()); err != nil {
			return err
		}
		// Not by maps that are shared.
		if id, ok := info.ID(); ok {
			if _, err := detachAll(map[ebpf.MapID]struct{}{id: {}}); err != nil {
				return err
			}
		}
	} else if !errors.Is(err, ErrNotInstalled) {
		return err
	}
	if err := os.RemoveAll(f.dir); err != nil {
		return fmt.Errorf("remove %s: %w", f.dir, err)
	}
	return nil
}
