// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"encoding/binary"
	"math/rand/v2"
	"testing"
)

// tape is a source of randomness that the fuzzer writes; after its end comes
// what a seed gives.
type tape struct {
	bytes []byte
	rest  rand.Source
}

func (s *tape) Uint64() uint64 {
	if len(s.bytes) < 8 {
		return s.rest.Uint64()
	}
	n := binary.BigEndian.Uint64(s.bytes)
	s.bytes = s.bytes[8:]
	return n
}

// FuzzReplay is TestReplay with histories that the fuzzer chooses. Coverage
// depends on the order of maps, which minimising cannot cope with: run it with
// -fuzzminimizetime=1x.
func FuzzReplay(f *testing.F) {
	for seed := range uint64(8) {
		var history []byte
		for d := roll(seed); len(history) < 4096; {
			history = binary.BigEndian.AppendUint64(history, d.Uint64())
		}
		f.Add(history)
	}
	f.Fuzz(func(t *testing.T, history []byte) {
		d := &dice{Rand: rand.New(&tape{history, rand.NewPCG(1, 1)}), rivals: true}
		replay(t, d, 8)
	})
}
