// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"slices"
)

// String is the digest in hexadecimal.
func (d Digest) String() string { return hex.EncodeToString(d[:]) }

// encoding collects the canonical bytes of a digest. Strings carry their
// length and lists their count, so that no two things encode alike.
type encoding []byte

func encode(kind string) encoding { return encoding(nil).text(kind) }

func (e encoding) number(n uint64) encoding { return binary.AppendUvarint(e, n) }

func (e encoding) text(s string) encoding { return append(e.number(uint64(len(s))), s...) }

func (e encoding) flag(b bool) encoding {
	if b {
		return append(e, 1)
	}
	return append(e, 0)
}

func (e encoding) digest(d Digest) encoding { return append(e, d[:]...) }

// list appends digests in the order given.
func (e encoding) list(ds []Digest) encoding {
	e = e.number(uint64(len(ds)))
	for _, d := range ds {
		e = e.digest(d)
	}
	return e
}

// set appends digests so that neither their order nor repetition counts. It
// sorts ds.
func (e encoding) set(ds []Digest) encoding {
	slices.SortFunc(ds, compareDigests)
	return e.list(slices.Compact(ds))
}

// sum is the truncated SHA-256 of what was collected.
func (e encoding) sum() Digest {
	h := sha256.Sum256(e)
	return Digest(h[:len(Digest{})])
}

func compareDigests(a, b Digest) int { return slices.Compare(a[:], b[:]) }

// Owner is the non-zero mark of a pod on its addresses.
func (k PodKey) Owner() uint16 {
	d := encode("owner").text(string(k)).sum()
	return max(1, binary.BigEndian.Uint16(d[:]))
}
