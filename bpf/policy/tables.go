// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package policy

// tables is what the kernel has after the last update, as far as it is not
// kept with the places, nodes, classes and rulesets themselves.
type tables struct {
	subjects map[PodKey]*subject
	joins    map[[2]*class]*class
	policies counted[PolicyInfo]
	rules    counted[RuleInfo]
}

// subject is a [Subject] in the tables.
type subject struct {
	Subject
	class *class
}

func newTables() tables {
	return tables{
		subjects: map[PodKey]*subject{},
		joins:    map[[2]*class]*class{},
		policies: counted[PolicyInfo]{},
		rules:    counted[RuleInfo]{},
	}
}

// counted holds infos by digest and how many rulesets have them.
type counted[T any] map[Digest]*struct {
	info     T
	rulesets int
	live     bool // in the tables as of the last update
}

func (m counted[T]) hold(d Digest, info T) {
	if m[d] == nil {
		m[d] = &struct {
			info     T
			rulesets int
			live     bool
		}{info: info}
	}
	m[d].rulesets++
}

// settle ends an update and returns what entered and left the tables.
func (m counted[T]) settle() (added []T, gone []Digest) {
	for d, x := range m {
		switch {
		case x.rulesets == 0:
			delete(m, d)
			gone = append(gone, d)
		case !x.live:
			x.live = true
			added = append(added, x.info)
		}
	}
	return added, gone
}

// dump returns the tables whole.
func (c *Compiler) dump() Update {
	u := Update{Full: true}
	for _, x := range c.tables.policies {
		u.Policies = append(u.Policies, x.info)
	}
	for _, x := range c.tables.rules {
		u.Rules = append(u.Rules, x.info)
	}
	for _, r := range c.rulesets {
		u.Rulesets = append(u.Rulesets, r.Ruleset)
		u.Cells = c.appendCells(u.Cells, r)
	}
	for _, k := range c.classes.bySig {
		if k.live {
			u.Classes = append(u.Classes, k.digest)
		}
	}
	for k, joined := range c.tables.joins {
		u.Joins = append(u.Joins, join(k, joined))
	}
	c.prefixes.all(func(n *node) { u.Peers = append(u.Peers, n.entry()) })
	for a, at := range c.places {
		u.Peers = append(u.Peers, at.entry(a))
	}
	for _, s := range c.tables.subjects {
		u.Subjects = append(u.Subjects, s.Subject)
	}
	return u
}

// appendCells appends the cells that a ruleset has with the live classes.
func (c *Compiler) appendCells(cells []Cell, r *ruleset) []Cell {
	if cell, ok := r.zeroCell(); ok {
		cells = append(cells, cell)
	}
	seen := map[*class]struct{}{}
	visit := func(x *trait) {
		for k := range x.classes {
			if _, ok := seen[k]; ok {
				continue
			}
			seen[k] = struct{}{}
			if cell, ok := r.cell(k); ok {
				cells = append(cells, cell)
			}
		}
	}
	for _, x := range r.traits {
		visit(x)
	}
	for _, n := range r.names {
		for _, x := range n.ports {
			visit(x)
		}
	}
	return cells
}

func join(pair [2]*class, joined *class) Join {
	return Join{Pod: pair[0].digest, Block: pair[1].digest, Class: joined.digest}
}
