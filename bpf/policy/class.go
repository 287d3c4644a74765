// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package policy

// class is all peers with one signature.
type class struct {
	digest    Digest
	signature signature
	// entries counts the peers, subjects and joins in the tables that have
	// the class; it is in the tables while there are any.
	entries int
	// profiles counts the profiles whose pods have the class where no block
	// covers them.
	profiles int
	live     bool // in the tables as of the last update
}

// classTable interns classes.
type classTable struct {
	zero   *class
	bySig  map[string]*class
	unions map[[2]*class]*class // of the update being made
	// touched classes may have entered or left the tables.
	touched map[*class]struct{}
}

func newClassTable() classTable {
	return classTable{
		zero:    &class{},
		bySig:   map[string]*class{},
		unions:  map[[2]*class]*class{},
		touched: map[*class]struct{}{},
	}
}

// intern returns the class of a sorted signature, which it keeps.
func (t *classTable) intern(s signature) *class {
	if len(s) == 0 {
		return t.zero
	}
	var buf [128]byte
	key := s.key(buf[:0])
	c := t.bySig[string(key)]
	if c == nil {
		c = &class{digest: s.digest(), signature: s}
		t.bySig[string(key)] = c
		t.touched[c] = struct{}{}
	}
	return c
}

// union returns the class of what has the traits of both.
func (t *classTable) union(a, b *class) *class {
	if a == t.zero || a == b {
		return b
	}
	if b == t.zero {
		return a
	}
	c := t.unions[[2]*class{a, b}]
	if c == nil {
		both := make(signature, 0, len(a.signature)+len(b.signature))
		both = append(append(both, a.signature...), b.signature...)
		c = t.intern(both.sorted())
		t.unions[[2]*class{a, b}] = c
	}
	return c
}

// replace moves one entry of the tables from a class to another; nil stands
// for no entry.
func (t *classTable) replace(from, to *class) {
	t.count(from, -1)
	t.count(to, 1)
}

func (t *classTable) count(c *class, n int) {
	if c == nil || c == t.zero {
		return
	}
	c.entries += n
	t.touched[c] = struct{}{}
}

// settle ends the changes of an update and returns the classes that entered
// and left the tables.
func (t *classTable) settle() (added, gone []*class) {
	for c := range t.touched {
		live := c.entries > 0
		switch {
		case live && !c.live:
			added = append(added, c)
			for _, x := range c.signature {
				x.classes[c] = struct{}{}
			}
		case !live && c.live:
			gone = append(gone, c)
			for _, x := range c.signature {
				delete(x.classes, c)
			}
		}
		c.live = live
		if !live && c.profiles == 0 {
			delete(t.bySig, string(c.signature.key(nil)))
		}
	}
	clear(t.touched)
	clear(t.unions)
	return added, gone
}

// without returns the class of what has the traits of c but those dropped.
func (t *classTable) without(c *class, dropped map[*trait]struct{}) *class {
	kept := make(signature, 0, len(c.signature))
	for _, x := range c.signature {
		if _, ok := dropped[x]; !ok {
			kept = append(kept, x)
		}
	}
	return t.intern(kept)
}
