// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package pinning

import (
	"fmt"
	"strings"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"

	"github.com/podgate/podgate/bpf"
)

// shape is the size of a map's key and value in bytes.
type shape struct{ key, value uint32 }

func shapeOf[K, V any]() shape {
	var k K
	var v V
	return shape{uint32(unsafe.Sizeof(k)), uint32(unsafe.Sizeof(v))}
}

// shapes of the pinned maps by name, as the Go types have them.
func shapes() map[string]shape {
	return map[string]shape{
		bpf.DatapathMapGates:            shapeOf[uint32, bpf.DatapathGate](),
		bpf.DatapathMapState:            shapeOf[uint32, bpf.DatapathState](),
		bpf.DatapathMapEndpoints:        shapeOf[bpf.DatapathAttachment, bpf.DatapathEndpoint](),
		bpf.DatapathMapClaims:           shapeOf[bpf.DatapathAddress, bpf.DatapathClaim](),
		bpf.DatapathMapSources:          shapeOf[bpf.DatapathSource, uint32](),
		bpf.DatapathMapPods:             shapeOf[bpf.DatapathPodKey, bpf.DatapathPod](),
		bpf.DatapathMapPeers:            shapeOf[bpf.DatapathAddress, bpf.DatapathPeer](),
		bpf.DatapathMapBlocks:           shapeOf[bpf.DatapathBlockKey, bpf.DatapathPeer](),
		bpf.DatapathMapFrontends:        shapeOf[bpf.DatapathFrontendKey, bpf.DatapathFrontend](),
		bpf.DatapathMapServices:         shapeOf[uint32, bpf.DatapathService](),
		bpf.DatapathMapJoins:            shapeOf[bpf.DatapathJoinKey, uint32](),
		bpf.DatapathMapClasses:          shapeOf[uint32, bpf.DatapathDigest](),
		bpf.DatapathMapRulesets:         shapeOf[uint32, bpf.DatapathRuleset](),
		bpf.DatapathMapCells:            shapeOf[bpf.DatapathCellKey, bpf.DatapathCell](),
		bpf.DatapathMapRuleInfo:         shapeOf[uint32, bpf.DatapathRuleInfo](),
		bpf.DatapathMapPolicyInfo:       shapeOf[uint32, bpf.DatapathPolicyInfo](),
		bpf.DatapathMapRulesetPolicies:  shapeOf[bpf.DatapathRulesetPolicyKey, uint32](),
		bpf.DatapathMapFlows:            shapeOf[bpf.DatapathFlowKey, bpf.DatapathFlow](),
		bpf.DatapathMapBackends:         shapeOf[bpf.DatapathFlowKey, bpf.DatapathBackend](),
		bpf.DatapathMapHandovers:        shapeOf[uint32, bpf.DatapathHandover](),
		bpf.DatapathMapFragments:        shapeOf[bpf.DatapathFragmentKey, bpf.DatapathFragment](),
		bpf.DatapathMapNeighbours:       shapeOf[bpf.DatapathNeighbourKey, bpf.DatapathNeighbour](),
		bpf.DatapathMapEvents:           {},
		bpf.DatapathMapEndpointCounters: shapeOf[uint32, bpf.DatapathEndpointCounters](),
		bpf.DatapathMapRuleCounters:     shapeOf[uint32, bpf.DatapathCounter](),
		bpf.DatapathMapDropCounters:     shapeOf[uint32, bpf.DatapathCounter](),
		bpf.DatapathMapLostEvents:       shapeOf[uint32, uint64](),
	}
}

// verify compares every pinned map with what this binary was built with: type,
// sizes, flags, and the BTF of key and value, since layouts of equal size may
// mean different things.
func (s *State) verify() error {
	spec, err := bpf.LoadDatapath()
	if err != nil {
		return fmt.Errorf("read programs: %w", err)
	}
	for _, name := range mapNames() {
		m, err := s.m(name)
		if err != nil {
			return err
		}
		if err := compatible(spec.Maps[name], m); err != nil {
			return fmt.Errorf("map %s: %w", name, err)
		}
	}
	for _, name := range programNames() {
		if _, err := s.program(name); err != nil {
			return err
		}
	}
	return nil
}

func compatible(want *ebpf.MapSpec, m *ebpf.Map) error {
	if m.Type() != want.Type || m.KeySize() != want.KeySize || m.ValueSize() != want.ValueSize ||
		m.Flags() != want.Flags {
		return fmt.Errorf("%w: it is a %s with keys of %d and values of %d bytes and flags %#x, not a %s with %d, %d and %#x",
			ErrABI, m.Type(), m.KeySize(), m.ValueSize(), m.Flags(), want.Type, want.KeySize, want.ValueSize, want.Flags)
	}
	if want.Key == nil || want.Value == nil {
		return nil
	}
	info, err := m.Info()
	if err != nil {
		return fmt.Errorf("info: %w", err)
	}
	id, ok := info.BTFID()
	if !ok {
		// The kernel has no BTF for maps; type and sizes have to do.
		return nil
	}
	handle, err := btf.NewHandleFromID(id)
	if err != nil {
		return fmt.Errorf("BTF: %w", err)
	}
	defer func() { _ = handle.Close() }()
	have, err := handle.Spec(nil)
	if err != nil {
		return fmt.Errorf("BTF: %w", err)
	}
	for _, t := range []btf.Type{want.Key, want.Value} {
		if err := sameLayout(t, have); err != nil {
			return err
		}
	}
	return nil
}

// sameLayout looks a named struct up in the BTF of a pinned map.
func sameLayout(want btf.Type, in *btf.Spec) error {
	st, ok := btf.As[*btf.Struct](want)
	if !ok {
		return nil
	}
	var have *btf.Struct
	if err := in.TypeByName(st.Name, &have); err != nil {
		return fmt.Errorf("%w: it knows no struct %s", ErrABI, st.Name)
	}
	if a, b := layout(st), layout(have); a != b {
		return fmt.Errorf("%w: struct %s is {%s}, not {%s}", ErrABI, st.Name, b, a)
	}
	return nil
}

// layout writes a type out with names and offsets, so that equal strings mean
// equal layout and, as far as names tell, meaning.
func layout(t btf.Type) string {
	switch t := btf.UnderlyingType(t).(type) {
	case *btf.Struct:
		members := make([]string, 0, len(t.Members))
		for _, m := range t.Members {
			members = append(members, fmt.Sprintf("%s@%d:%s", m.Name, m.Offset.Bytes(), layout(m.Type)))
		}
		return strings.Join(members, " ")
	case *btf.Array:
		return fmt.Sprintf("%s[%d]", layout(t.Type), t.Nelems)
	case *btf.Int:
		return fmt.Sprintf("%d%s", t.Size, t.Encoding)
	default:
		return fmt.Sprint(t)
	}
}
