// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package pinning

import (
	"errors"
	"fmt"
	"sync/atomic"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/podgate/podgate/bpf"
)

// shared is the memory of the gates and state maps. Map updates through the
// syscall copy; a store through the mapping is one store, which is what the
// datapath relies on for rulesets, ifindex and epoch.
type shared struct {
	gateMemory, stateMemory []byte
	gates                   []bpf.DatapathGate
	state                   *bpf.DatapathState
}

func (s *State) memory() (*shared, error) {
	if s.shared != nil {
		return s.shared, nil
	}
	gates, err := s.m(bpf.DatapathMapGates)
	if err != nil {
		return nil, err
	}
	state, err := s.m(bpf.DatapathMapState)
	if err != nil {
		return nil, err
	}
	sh := &shared{}
	if sh.gateMemory, err = mapMemory(gates); err != nil {
		return nil, err
	}
	if sh.stateMemory, err = mapMemory(state); err != nil {
		return nil, errors.Join(err, sh.close())
	}
	sh.gates = unsafe.Slice((*bpf.DatapathGate)(unsafe.Pointer(&sh.gateMemory[0])), gates.MaxEntries())
	sh.state = (*bpf.DatapathState)(unsafe.Pointer(&sh.stateMemory[0]))
	s.shared = sh
	return sh, nil
}

func mapMemory(m *ebpf.Map) ([]byte, error) {
	b, err := unix.Mmap(m.FD(), 0, int(m.MaxEntries()*m.ValueSize()), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map the memory of %s: %w", m, err)
	}
	return b, nil
}

func (sh *shared) close() error {
	var errs []error
	for _, b := range [][]byte{sh.gateMemory, sh.stateMemory} {
		if b != nil {
			errs = append(errs, unix.Munmap(b))
		}
	}
	return errors.Join(errs...)
}

// Enforcement is the rulesets of an endpoint's two directions.
type Enforcement struct {
	Ingress, Egress uint32
}

// The rulesets that are not compiled.
const (
	RulesetClosed uint32 = 0
	RulesetOpen   uint32 = 1
	rulesetFirst  uint32 = 2
)

// State says in a word what an endpoint's gate does: "closed" while its policy
// is not known, "open" when nothing isolates it, else "enforcing".
func (e Enforcement) State() string {
	switch {
	case e.Ingress == RulesetClosed || e.Egress == RulesetClosed:
		return "closed"
	case e.Ingress == RulesetOpen && e.Egress == RulesetOpen:
		return "open"
	default:
		return "enforcing"
	}
}

func (e Enforcement) word() uint64 { return uint64(e.Egress)<<32 | uint64(e.Ingress) }

func rulesets(g *bpf.DatapathGate) *uint64 { return (*uint64)(unsafe.Pointer(&g.Rulesets)) }

func (sh *shared) enforcement(slot uint32) Enforcement {
	w := atomic.LoadUint64(rulesets(&sh.gates[slot]))
	return Enforcement{Ingress: uint32(w), Egress: uint32(w >> 32)}
}

func (sh *shared) enforce(slot uint32, e Enforcement) {
	atomic.StoreUint64(rulesets(&sh.gates[slot]), e.word())
}

// gateProbes is GATE_PROBES of bpf/include/types.h.
const gateProbes = 8

// slotFor finds the gate of an interface, or the free slot for it.
func (sh *shared) slotFor(ifindex uint32) (slot uint32, taken bool, err error) {
	free, found := uint32(0), false
	mask := uint32(len(sh.gates) - 1)
	for i := range uint32(gateProbes) {
		slot := (ifindex + i) & mask
		switch atomic.LoadUint32(&sh.gates[slot].Ifindex) {
		case ifindex:
			return slot, true, nil
		case 0:
			if !found {
				free, found = slot, true
			}
		}
	}
	if !found {
		return 0, false, fmt.Errorf("gate for interface %d: %w: raise capacity endpoints", ifindex, ErrFull)
	}
	return free, false, nil
}

// publish makes a gate visible to the datapath, whole.
func (sh *shared) publish(slot uint32, g bpf.DatapathGate) {
	to := &sh.gates[slot]
	sh.enforce(slot, Enforcement{g.Rulesets.Ingress, g.Rulesets.Egress})
	to.Endpoint, to.Mac, to.Flags, to.Own, to.Reserved = g.Endpoint, g.Mac, g.Flags, g.Own, 0
	atomic.StoreUint32(&to.Ifindex, g.Ifindex)
}

// retract takes a gate away: from here on its interface is closed.
func (sh *shared) retract(slot uint32) {
	g := &sh.gates[slot]
	atomic.StoreUint32(&g.Ifindex, 0)
	sh.enforce(slot, Enforcement{})
	g.Endpoint, g.Mac, g.Flags, g.Own = 0, [6]uint8{}, 0, [2]bpf.DatapathAddress{}
}

// bumpEpoch makes every flow be judged again at its next packet.
func (sh *shared) bumpEpoch() { atomic.AddUint32(&sh.state.Epoch, 1) }

// setFlags changes an endpoint's switches.
func (sh *shared) setFlags(slot uint32, flags uint16) { sh.gates[slot].Flags = flags }
