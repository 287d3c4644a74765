// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package pinning

import (
	"fmt"
	"time"

	"github.com/podgate/podgate/bpf/policy"
)

// ids gives digests small numbers and keeps them across restarts: the numbers
// are read back from what is pinned. Freed numbers are used again as late as
// possible.
type ids struct {
	what        string
	first, last uint32
	next        uint32
	byDigest    map[policy.Digest]uint32
	used        map[uint32]policy.Digest
	// condemned numbers go when nothing can refer to them any more.
	condemned map[uint32]time.Time
}

func newIDs(what string, first, last uint32) *ids {
	return &ids{
		what: what, first: first, last: last, next: first,
		byDigest:  map[policy.Digest]uint32{},
		used:      map[uint32]policy.Digest{},
		condemned: map[uint32]time.Time{},
	}
}

func (t *ids) adopt(d policy.Digest, id uint32) {
	t.used[id] = d
	if _, dup := t.byDigest[d]; dup {
		t.condemned[id] = time.Now()
		return
	}
	t.byDigest[d] = id
	if id >= t.next {
		t.next = id + 1
	}
}

// assign returns the number of a digest, a new one if it has none.
func (t *ids) assign(d policy.Digest) (id uint32, isNew bool, err error) {
	if id, ok := t.byDigest[d]; ok {
		delete(t.condemned, id)
		return id, false, nil
	}
	if uint32(len(t.used)) > t.last-t.first {
		return 0, false, fmt.Errorf("%s: %w: all %d numbers are in use", t.what, ErrFull, t.last-t.first+1)
	}
	for {
		if t.next > t.last {
			t.next = t.first
		}
		id = t.next
		t.next++
		if _, taken := t.used[id]; !taken {
			break
		}
	}
	t.used[id] = d
	t.byDigest[d] = id
	return id, true, nil
}

// forget lets the next assign of the digest get another number; this one is
// condemned.
func (t *ids) forget(d policy.Digest, now time.Time) {
	if id, ok := t.byDigest[d]; ok {
		delete(t.byDigest, d)
		t.condemned[id] = now
	}
}

// condemn marks the number of a digest; assign takes that back.
func (t *ids) condemn(d policy.Digest, now time.Time) {
	if id, ok := t.byDigest[d]; ok {
		t.condemned[id] = now
	}
}

// due lists the numbers condemned before a time.
func (t *ids) due(before time.Time) []uint32 {
	var out []uint32
	for id, at := range t.condemned {
		if at.Before(before) {
			out = append(out, id)
		}
	}
	return out
}

// free gives a swept number back.
func (t *ids) free(id uint32) {
	if d := t.used[id]; t.byDigest[d] == id {
		delete(t.byDigest, d)
	}
	delete(t.condemned, id)
	delete(t.used, id)
}
