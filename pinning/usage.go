// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package pinning

import (
	"fmt"
	"reflect"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"

	"github.com/podgate/podgate/bpf"
)

// MapUsage is how full a map is.
type MapUsage struct {
	Name string `json:"name"`
	// Used entries; -1 for arrays, rings and caches. Where entries expire, those
	// that have not: the others stay until the kernel needs their room.
	Used  int    `json:"used"`
	Max   uint32 `json:"max"`
	Bytes uint64 `json:"bytes"`
	// Evicts says that the kernel makes room for what is new by dropping what
	// was used least recently.
	Evicts bool `json:"evicts,omitempty"`
}

// How full a map is, in percent, when somebody should hear of it, and when it
// is about to close endpoints or to forget flows.
const (
	FillWarning = 80
	FillUrgent  = 95
)

// Full is how full the map is in percent; -1 if that is not known.
func (u MapUsage) Full() int {
	if u.Used < 0 || u.Max == 0 {
		return -1
	}
	return int(uint64(u.Used) * 100 / uint64(u.Max))
}

// Consequence says what becomes of what finds no room in the map.
func (u MapUsage) Consequence() string {
	if u.Evicts {
		return "what was idle longest is forgotten, and judged again at its next packet"
	}
	return "what finds no room is closed"
}

// Usage of the pinned maps, by name.
func (s *State) Usage() ([]MapUsage, error) {
	now, err := jiffies()
	if err != nil {
		return nil, err
	}
	var out []MapUsage
	for _, name := range mapNames() {
		m, err := s.m(name)
		if err != nil {
			return nil, err
		}
		u := MapUsage{Name: name, Used: -1, Max: m.MaxEntries(), Evicts: m.Type() == ebpf.LRUHash}
		if info, err := m.Info(); err == nil {
			u.Bytes, _ = info.Memlock()
		}
		switch m.Type() {
		case ebpf.LRUHash:
			u.Used, err = alive(name, m, now)
		case ebpf.Hash, ebpf.LPMTrie:
			u.Used, err = count(m)
		default:
		}
		if err != nil {
			return nil, err
		}
		out = append(out, u)
	}
	return out, nil
}

// alive counts entries that have not expired; -1 where they do not expire.
func alive(name string, m *ebpf.Map, now uint64) (int, error) {
	switch name {
	case bpf.DatapathMapFlows:
		return countIf[bpf.DatapathFlowKey](m, func(f *bpf.DatapathFlow) bool { return int64(now-f.Expires) <= 0 })
	case bpf.DatapathMapFragments:
		return countIf[bpf.DatapathFragmentKey](m, func(f *bpf.DatapathFragment) bool { return int64(now-f.Expires) <= 0 })
	case bpf.DatapathMapNeighbours:
		return countIf[bpf.DatapathNeighbourKey](m, func(n *bpf.DatapathNeighbour) bool { return int64(now-n.Expires) <= 0 })
	default:
		return -1, nil
	}
}

// jiffies is the clock that entries expire by, which only programs can read.
func jiffies() (uint64, error) {
	const cb = skbCB * 4
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: "jiffies", Type: ebpf.SchedCLS, License: "GPL", Instructions: asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.FnJiffies64.Call(),
		asm.StoreMem(asm.R6, cb, asm.R0, asm.Word),
		asm.RSh.Imm(asm.R0, 32),
		asm.StoreMem(asm.R6, cb+4, asm.R0, asm.Word),
		asm.Mov.Imm(asm.R0, 0),
		asm.Return(),
	}})
	if err != nil {
		return 0, fmt.Errorf("read jiffies: %w", err)
	}
	defer p.Close()
	out := make([]uint32, skbWords)
	if _, err := p.Run(&ebpf.RunOptions{Data: make([]byte, 64), Context: make([]uint32, skbWords), ContextOut: out}); err != nil {
		return 0, fmt.Errorf("read jiffies: %w", err)
	}
	return uint64(out[skbCB+1])<<32 | uint64(out[skbCB]), nil
}

// countIf counts the entries of a hash whose values are to be counted.
func countIf[K comparable, V any](m *ebpf.Map, counts func(*V) bool) (int, error) {
	total := 0
	keys, values := make([]K, readSize), make([]V, readSize)
	if readBatches(m, keys, values, func(n int) {
		for i := range n {
			if counts(&values[i]) {
				total++
			}
		}
	}) {
		return total, nil
	}
	total = 0
	var err error
	for _, v := range each[K, V](m, &err) {
		if counts(&v) {
			total++
		}
	}
	return total, err
}

// count walks a map's entries without looking at them.
func count(m *ebpf.Map) (int, error) {
	bytes := func(n uint32) any {
		return reflect.MakeSlice(reflect.SliceOf(reflect.ArrayOf(int(n), reflect.TypeFor[byte]())), readSize, readSize).Interface()
	}
	total := 0
	if readBatches(m, bytes(m.KeySize()), bytes(m.ValueSize()), func(n int) { total += n }) {
		return total, nil
	}
	total = 0
	key, err := m.NextKeyBytes(nil)
	for ; key != nil && err == nil && total < int(m.MaxEntries()); key, err = m.NextKeyBytes(key) {
		total++
	}
	if err != nil {
		return 0, fmt.Errorf("count %s: %w", m, err)
	}
	return total, nil
}
