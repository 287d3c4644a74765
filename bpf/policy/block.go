// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
)

// mappedBits is the length of ::ffff:0:0/96, where IPv4 lives in IPv6.
const mappedBits = 96

var (
	mappedIPv4 = netip.MustParseAddr("::ffff:0:0")
	wholeIPv4  = netip.MustParsePrefix("0.0.0.0/0")
)

// block is a checked [Block]: masked, of one family, except sorted.
type block struct {
	cidr   netip.Prefix
	except []netip.Prefix
}

// blockSet is all blocks of one rule. The rule cannot tell its blocks apart,
// so addresses are classified by the set: a list of a thousand CIDRs makes one
// class, not a thousand.
type blockSet struct {
	digest Digest
	blocks []block
}

func makeBlock(in Block) (block, Digest, error) {
	cidr, err := canonicalPrefix(in.CIDR)
	if err != nil {
		return block{}, Digest{}, fmt.Errorf("cidr: %w", err)
	}
	b := block{cidr: cidr}
	for i, x := range in.Except {
		x, err := canonicalPrefix(x)
		if err != nil {
			return block{}, Digest{}, fmt.Errorf("except[%d]: %w", i, err)
		}
		// The API server asks for the same.
		if !cidr.Contains(x.Addr()) || x.Bits() <= cidr.Bits() {
			return block{}, Digest{}, fmt.Errorf("except[%d]: %s is not a strict subset of %s", i, x, cidr)
		}
		b.except = append(b.except, x)
	}
	slices.SortFunc(b.except, netip.Prefix.Compare)
	b.except = slices.Compact(b.except)

	e := encodePrefix(encode("block"), cidr).number(uint64(len(b.except)))
	for _, x := range b.except {
		e = encodePrefix(e, x)
	}
	return b, e.sum(), nil
}

// makeBlockSet takes blocks with their digests; nil when there are none.
func makeBlockSet(blocks map[Digest]block) *blockSet {
	if len(blocks) == 0 {
		return nil
	}
	s := &blockSet{}
	digests := make([]Digest, 0, len(blocks))
	for d, b := range blocks {
		digests = append(digests, d)
		s.blocks = append(s.blocks, b)
	}
	s.digest = encode("blocks").set(digests).sum()
	return s
}

// canonicalPrefix masks a prefix and turns IPv4-mapped IPv6 into IPv4.
func canonicalPrefix(p netip.Prefix) (netip.Prefix, error) {
	if !p.IsValid() {
		return p, errors.New("not a valid prefix")
	}
	p = p.Masked()
	if p.Addr().Is4In6() {
		p = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-mappedBits)
	}
	return p, nil
}

func encodePrefix(e encoding, p netip.Prefix) encoding {
	a := p.Addr().As16()
	return append(e.flag(p.Addr().Is4()).number(uint64(p.Bits())), a[:]...)
}
