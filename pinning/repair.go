// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package pinning

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/podgate/podgate/bpf"
)

// Repaired is one thing that [State.Repair] found and put right.
type Repaired struct {
	// Endpoint is zero for what belonged to none.
	Endpoint AttachmentKey
	// What was wrong, and what was done.
	What string
}

// Repair puts back hooks that somebody removed, removes endpoints whose
// interface is gone and pins that belong to no endpoint, and sweeps what
// updates left. It goes on after errors and returns them joined. It is called in
// the node's network namespace, and returns [ErrNetNS] elsewhere.
func (s *State) Repair(ctx context.Context) ([]Repaired, error) {
	var done []Repaired
	err := s.locked(ctx, func() error {
		if err := s.atHome(); err != nil {
			return err
		}
		var errs []error
		alive := map[uint32]struct{}{}
		for e, err := range s.Endpoints() {
			if err != nil {
				errs = append(errs, err)
				continue
			}
			what, gone, err := s.repair(e)
			if err != nil {
				errs = append(errs, fmt.Errorf("endpoint %s: %w", e.Key, err))
			}
			if what != "" {
				done = append(done, Repaired{e.Key, what})
			}
			if !gone {
				alive[e.ID] = struct{}{}
			}
		}
		attached, err := s.repairServices()
		errs = append(errs, err)
		done = append(done, attached...)
		swept, err := s.sweepPins(alive)
		errs = append(errs, err, s.sweepGates(alive), s.sweepSources(alive), s.sweepClaims(), s.Sweep(ctx))
		done = append(done, swept...)
		return errors.Join(errs...)
	})
	return done, err
}

// attachTime is how long an ADD may take to attach its hooks before Repair
// takes it for dead.
const attachTime = time.Minute

func (s *State) repair(e Endpoint) (what string, gone bool, err error) {
	if _, err := netlink.LinkByIndex(e.HostIfindex); isNoLink(err) {
		if err := s.delete(e.Key); err != nil {
			return "", false, err
		}
		return "its interface is gone: endpoint removed", true, s.changed()
	} else if err != nil {
		return "", false, fmt.Errorf("interface %d: %w", e.HostIfindex, err)
	}
	if e.Attach == AttachFormer || e.Attach == AttachAuto && time.Since(e.Created) < attachTime {
		return "", false, nil
	}
	if restored, err := s.restorePeers(e); err != nil {
		return "", false, err
	} else if restored {
		if err := s.addressesMoved(); err != nil {
			return "", false, err
		}
	}
	lost := s.attached(e)
	if lost == nil {
		return "", false, nil
	}
	if err := s.reattach(&e); err != nil {
		return "", false, errors.Join(lost, err)
	}
	return lost.Error() + ": attached again", false, nil
}

func (s *State) reattach(e *Endpoint) error {
	if e.Attach == AttachTCX {
		return s.replaceTCX(e.ID, e.HostIfindex)
	}
	if e.Attach == AttachAuto {
		e.Attach = AttachClsact
		if err := s.record(e); err != nil {
			return err
		}
	}
	err := addClsact(e.HostIfindex)
	if err == nil {
		return s.leadFilters(e.HostIfindex)
	}
	if !errors.Is(err, ErrNoHook) {
		return err
	}
	if err := s.attachTCX(e.ID, e.HostIfindex); err != nil {
		return err
	}
	e.Attach = AttachTCX
	return s.record(e)
}

// replaceTCX updates the links that are there and attaches those that are not.
func (s *State) replaceTCX(endpoint uint32, ifindex int) error {
	for direction, name := range programNames() {
		p, err := s.program(name)
		if err != nil {
			return err
		}
		path := s.layout.LinkPath(endpoint, name)
		l, err := link.LoadPinnedLink(path, nil)
		if err == nil {
			err = errors.Join(l.Update(p), l.Close())
		}
		if err == nil {
			continue
		}
		// Absent, or defunct: a link whose hook is gone cannot be updated.
		if err := os.RemoveAll(path); err != nil {
			return fmt.Errorf("unpin %s: %w", path, err)
		}
		if err := s.attachTCXHook(endpoint, ifindex, direction, name); err != nil {
			return err
		}
	}
	return nil
}

func isNoLink(err error) bool {
	var notFound netlink.LinkNotFoundError
	return errors.As(err, &notFound) || errors.Is(err, unix.ENODEV)
}

// sweepPins removes link directories that no endpoint has.
func (s *State) sweepPins(alive map[uint32]struct{}) ([]Repaired, error) {
	entries, err := os.ReadDir(s.layout.LinksDir())
	if err != nil {
		return nil, fmt.Errorf("read links: %w", err)
	}
	owned := map[string]struct{}{}
	for id := range alive {
		owned[strconv.FormatUint(uint64(id), 10)] = struct{}{}
	}
	var done []Repaired
	for _, entry := range entries {
		if _, ok := owned[entry.Name()]; ok || entry.Name() == filepath.Base(s.layout.natDir()) {
			continue
		}
		path := filepath.Join(s.layout.LinksDir(), entry.Name())
		if err := os.RemoveAll(path); err != nil {
			return done, fmt.Errorf("unpin %s: %w", path, err)
		}
		done = append(done, Repaired{What: "links " + path + " belong to no endpoint: unpinned"})
	}
	return done, nil
}

// sweepGates retracts gates that no record names.
func (s *State) sweepGates(alive map[uint32]struct{}) error {
	sh, err := s.memory()
	if err != nil {
		return err
	}
	for i := range sh.gates {
		g := &sh.gates[i]
		if _, ok := alive[g.Endpoint]; g.Ifindex != 0 && !ok {
			sh.retract(uint32(i))
		}
	}
	return nil
}

func (s *State) sweepSources(alive map[uint32]struct{}) error {
	m, err := s.m(bpf.DatapathMapSources)
	if err != nil {
		return err
	}
	return sweepKeys(m, func(k bpf.DatapathSource) bool {
		_, ok := alive[k.Endpoint]
		return ok
	})
}

// claimTime is how long a claim may wait for its endpoint: longer than any
// chain of plugins takes.
const claimTime = 10 * time.Minute

// sweepClaims ends claims made at allocation whose endpoint never came.
func (s *State) sweepClaims() error {
	m, err := s.m(bpf.DatapathMapClaims)
	if err != nil {
		return err
	}
	claims, err := dump[bpf.DatapathAddress, bpf.DatapathClaim](m)
	if err != nil {
		return err
	}
	var errs []error
	for a, c := range claims {
		if c.Endpoint != 0 || time.Since(time.Unix(0, int64(c.CreatedNs))) < claimTime {
			continue
		}
		errs = append(errs, s.release(attachmentKey(&c.Attachment), []netip.Addr{unwire(a)}), s.addressesMoved())
	}
	return errors.Join(errs...)
}

// Upgrade makes every hook run this binary's programs, if they are not the
// pinned ones already: the new programs are loaded on the pinned maps, pinned
// in place of the old ones and swapped in hook by hook. No packet meets no
// program. It reports whether there was anything to do. It is called in the
// node's network namespace, and returns [ErrNetNS] elsewhere.
func (s *State) Upgrade(ctx context.Context) (bool, error) {
	upgraded := false
	err := s.locked(ctx, func() error {
		if err := errors.Join(s.atHome(), s.verify()); err != nil {
			return err
		}
		coll, err := load(Capacity{}.withDefaults(), s.pinnedMaps())
		if err != nil {
			return err
		}
		defer coll.Close()
		same := true
		for _, name := range programNames() {
			old, err := s.program(name)
			if err != nil {
				return err
			}
			equal, err := sameProgram(old, coll.Programs[name])
			if err != nil {
				return err
			}
			same = same && equal
		}
		if upgraded, err = s.upgradeServices(); err != nil {
			return err
		}
		if same {
			return nil
		}
		upgraded = true
		for _, name := range programNames() {
			p := coll.Programs[name]
			if err := s.repin(name, func(path string) error { return p.Pin(path) }); err != nil {
				return err
			}
			_ = s.programs[name].Close()
			delete(s.programs, name)
		}
		return s.swapAll()
	})
	return upgraded, err
}

// sameProgram compares tags, the kernel's digest of a program's instructions
// without what differs from load to load, and the constants they refer to.
func sameProgram(a, b *ebpf.Program) (bool, error) {
	x, err := a.Info()
	if err != nil {
		return false, fmt.Errorf("info of %s: %w", a, err)
	}
	y, err := b.Info()
	if err != nil {
		return false, fmt.Errorf("info of %s: %w", b, err)
	}
	if x.Tag != y.Tag {
		return false, nil
	}
	former, err := constants(x)
	if err != nil {
		return false, fmt.Errorf("constants of %s: %w", a, err)
	}
	next, err := constants(y)
	if err != nil {
		return false, fmt.Errorf("constants of %s: %w", b, err)
	}
	return bytes.Equal(former, next), nil
}

// constants is the read-only data of a loaded program.
func constants(p *ebpf.ProgramInfo) ([]byte, error) {
	ids, _ := p.MapIDs()
	for _, id := range ids {
		m, err := ebpf.NewMapFromID(id)
		if err != nil {
			return nil, err
		}
		info, err := m.Info()
		if err != nil || info.Name != ".rodata" {
			if err := errors.Join(err, m.Close()); err != nil {
				return nil, err
			}
			continue
		}
		value, err := m.LookupBytes(uint32(0))
		return value, errors.Join(err, m.Close())
	}
	return nil, nil
}

func (s *State) pinnedMaps() map[string]*ebpf.Map {
	out := map[string]*ebpf.Map{}
	for _, name := range mapNames() {
		out[name] = s.opened[name]
	}
	return out
}

// repin publishes an object under a new name and renames it over the old one.
func (s *State) repin(name string, pin func(path string) error) error {
	path := s.layout.ProgramPath(name)
	building := path + "_new"
	if err := os.RemoveAll(building); err != nil {
		return fmt.Errorf("clean up: %w", err)
	}
	if err := pin(building); err != nil {
		return fmt.Errorf("pin %s: %w", building, err)
	}
	if err := os.Rename(building, path); err != nil {
		return fmt.Errorf("publish %s: %w", path, err)
	}
	return nil
}

func (s *State) swapAll() error {
	var errs []error
	for e, err := range s.Endpoints() {
		if err == nil {
			err = s.swap(e)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("endpoint %s: %w", e.Key, err))
		}
	}
	return errors.Join(errs...)
}

func (s *State) swap(e Endpoint) error {
	if _, err := netlink.LinkByIndex(e.HostIfindex); isNoLink(err) {
		return nil // Repair removes it.
	}
	switch e.Attach {
	case AttachAuto, AttachFormer:
		return nil // Its ADD, or TakeOver, is at it, and Repair looks after it.
	case AttachTCX:
		return s.replaceTCX(e.ID, e.HostIfindex)
	default:
	}
	return s.replaceFilters(e.HostIfindex)
}
