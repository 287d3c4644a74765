// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package bpf_test

import (
	"flag"
	"math/rand/v2"
	"strings"
	"testing"
	"time"
)

var mutationSeed = flag.Uint64("mutation-seed", 0, "seed of TestMutations; 0 takes the time")

// TestMutations changes bytes of known shapes at random. Whatever comes of it:
// the parser in place and the one that copies, which a VLAN tag leads to, say
// the same; and nobody's peer gets nothing through but what keeps neighbours.
func TestMutations(t *testing.T) {
	seed := *mutationSeed
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())
	}
	t.Logf("-mutation-seed=%d", seed)
	random := rand.New(rand.NewPCG(seed, 1))
	l := newLab(t).isolated()
	shapes := allShapes()
	for range 4000 {
		s := shapes[random.IntN(len(shapes))]
		d := directions[[...]string{"ingress", "egress"}[random.IntN(2)]]
		stranger := random.IntN(2) == 0
		if stranger {
			s.peer = foe
		}
		frame := s.frame(between(d, s.peer))
		addresses := 14 + 12 // of IPv4; IPv6 has its own at 22
		if len(frame) > 13 && frame[12] == 0x86 {
			addresses = 14 + 8
		}
		for range 1 + random.IntN(3) {
			// Addresses stay: another peer may be allowed more.
			at := 14 + random.IntN(len(frame)-14+1)
			if at >= len(frame) || stranger && at >= addresses && at < addresses+32 {
				continue
			}
			frame[at] ^= byte(1 << random.IntN(8))
		}
		frame = frame[:max(shortest(frame), len(frame)-random.IntN(4))]
		l.clear()
		plain := l.run(d, frame)
		l.clear()
		behind := l.run(d, tagged(frame, etherVLAN))
		if plain != behind && s.name != "three tags" {
			t.Errorf("direction %d, %s, %x: %s, and tagged %s", d, s.name, frame, plain, behind)
		}
		// What passes without a reason keeps neighbours.
		if stranger && strings.HasPrefix(plain, "pass ") {
			t.Errorf("direction %d, %s, %x: %s", d, s.name, frame, plain)
		}
	}
}
