// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package pinning

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
)

// translation turns values of one layout of a struct into another: what has the
// same name has the same meaning, and what only the new layout knows is zero.
type translation struct{ from, to *btf.Struct }

// newTranslation looks the struct that this binary knows up in the BTF of a map
// that another version made.
func newTranslation(to btf.Type, m *ebpf.Map) (*translation, error) {
	known, ok := btf.As[*btf.Struct](to)
	if !ok {
		return nil, fmt.Errorf("%w: %s is no struct", ErrABI, to)
	}
	info, err := m.Info()
	if err != nil {
		return nil, fmt.Errorf("info: %w", err)
	}
	id, ok := info.BTFID()
	if !ok {
		return nil, fmt.Errorf("%w: it has no BTF", ErrABI)
	}
	handle, err := btf.NewHandleFromID(id)
	if err != nil {
		return nil, fmt.Errorf("BTF: %w", err)
	}
	defer func() { _ = handle.Close() }()
	spec, err := handle.Spec(nil)
	if err != nil {
		return nil, fmt.Errorf("BTF: %w", err)
	}
	t := &translation{to: known}
	if err := spec.TypeByName(known.Name, &t.from); err != nil {
		return nil, fmt.Errorf("%w: it knows no struct %s", ErrABI, known.Name)
	}
	return t, nil
}

// into decodes a value.
func (t *translation) into(value []byte, to any) error {
	if len(value) < int(t.from.Size) {
		return fmt.Errorf("%w: struct %s of %d bytes, not %d", ErrABI, t.from.Name, len(value), t.from.Size)
	}
	out := make([]byte, t.to.Size)
	translate(out, value, t.to, t.from)
	if n, err := binary.Decode(out, binary.NativeEndian, to); err != nil || n != len(out) {
		return errors.Join(fmt.Errorf("%w: struct %s of %d bytes", ErrABI, t.to.Name, n), err)
	}
	return nil
}

// translate copies what two types have in common.
func translate(to, from []byte, toType, fromType btf.Type) {
	toType, fromType = btf.UnderlyingType(toType), btf.UnderlyingType(fromType)
	switch known := toType.(type) {
	case *btf.Struct:
		other, ok := fromType.(*btf.Struct)
		if !ok {
			return
		}
		for _, member := range known.Members {
			for _, m := range other.Members {
				if m.Name == member.Name {
					translate(to[member.Offset.Bytes():], from[m.Offset.Bytes():], member.Type, m.Type)
				}
			}
		}
	case *btf.Array:
		other, ok := fromType.(*btf.Array)
		if !ok {
			return
		}
		size, otherSize := sizeOf(known.Type), sizeOf(other.Type)
		for i := range min(known.Nelems, other.Nelems) {
			translate(to[i*size:], from[i*otherSize:], known.Type, other.Type)
		}
	default:
		// Little end first: what is longer by now keeps its value.
		copy(to[:sizeOf(toType)], from[:min(sizeOf(toType), sizeOf(fromType))])
	}
}

func sizeOf(t btf.Type) uint32 {
	n, err := btf.Sizeof(t)
	if err != nil {
		return 0 // a type that has none, such as a function
	}
	return uint32(n)
}
