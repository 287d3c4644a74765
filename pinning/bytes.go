// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package pinning

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"unsafe"

	"github.com/podgate/podgate/bpf"
)

// text reads a C string; C's char is Go's int8.
func text(c []int8) string {
	b := unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(c))), len(c))
	for i, x := range b {
		if x == 0 {
			return string(b[:i])
		}
	}
	return string(b)
}

// setText writes a C string with its terminator.
func setText(c []int8, what, s string) error {
	if len(s) >= len(c) {
		return fmt.Errorf("%w: %s is %d bytes long, %d are the most", ErrInvalid, what, len(s), len(c)-1)
	}
	clear(c)
	for i := range len(s) {
		c[i] = int8(s[i])
	}
	return nil
}

// cutText writes as much of a C string as fits.
func cutText(c []int8, s string) {
	clear(c)
	for i := range min(len(s), len(c)-1) {
		c[i] = int8(s[i])
	}
}

// wire is an address as the maps hold it: v4 as ::ffff:a.b.c.d.
func wire(a netip.Addr) bpf.DatapathAddress { return bpf.DatapathAddress{Bytes: a.As16()} }

func unwire(a bpf.DatapathAddress) netip.Addr { return netip.AddrFrom16(a.Bytes).Unmap() }

// tag is the fold of an address that peers entries carry; address_tag of
// bpf/include/judge.h.
func tag(a bpf.DatapathAddress) uint16 {
	x := binary.LittleEndian.Uint64(a.Bytes[:8]) ^ binary.LittleEndian.Uint64(a.Bytes[8:])
	x ^= x >> 32
	x ^= x >> 16
	return uint16(x)
}

// blockKey is the LPM key of a prefix.
func blockKey(p netip.Prefix) bpf.DatapathBlockKey {
	n := p.Bits()
	if p.Addr().Is4() {
		n += 96
	}
	return bpf.DatapathBlockKey{Prefixlen: uint32(n), Address: p.Masked().Addr().As16()}
}

func blockPrefix(k bpf.DatapathBlockKey) netip.Prefix {
	a := netip.AddrFrom16(k.Address)
	if a.Is4In6() && k.Prefixlen >= 96 {
		return netip.PrefixFrom(a.Unmap(), int(k.Prefixlen)-96)
	}
	return netip.PrefixFrom(a, int(k.Prefixlen))
}
