// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
)

// pair is who talks to whom.
type pair struct {
	from, to string
	port     port
}

// families of addresses over which a pair may talk.
type families struct{ v4, v6 bool }

// matrix says who reaches whom.
type matrix map[pair]families

func (m matrix) add(from, to string, port port, a netip.Addr, reached bool) {
	k := pair{from, to, port}
	f := m[k]
	if a.Is4() {
		f.v4 = reached
	} else {
		f.v6 = reached
	}
	m[k] = f
}

// differences lists the pairs on which two matrices do not agree.
func (m matrix) differences(other matrix) []string {
	var d []string
	for k, f := range m {
		if other[k] != f {
			d = append(d, fmt.Sprintf("%s to %s on %s: %s, %s", k.from, k.to, k.port, f, other[k]))
		}
	}
	for k := range maps.Keys(other) {
		if _, ok := m[k]; !ok {
			d = append(d, fmt.Sprintf("%s to %s on %s is missing", k.from, k.to, k.port))
		}
	}
	slices.Sort(d)
	return d
}

func (f families) String() string {
	switch {
	case f.v4 && f.v6:
		return "reached"
	case f.v4:
		return "reached over IPv4 only"
	case f.v6:
		return "reached over IPv6 only"
	}
	return "blocked"
}

// cellWidth is that of a column, for names of up to seven letters.
const cellWidth = 8

// print draws two matrices side by side, for every port one pair.
func (s style) print(names []string, left, right string, a, b matrix) {
	corner := "from \\ to"
	label := len(corner)
	for _, n := range names {
		label = max(label, len(n))
	}
	grid := label + 2 + cellWidth*len(names)
	columns := ""
	for _, n := range names {
		columns += fmt.Sprintf("%-*s", cellWidth, n)
	}
	for _, port := range ports {
		title := strings.ToUpper(port.String()) + ", " + left
		fmt.Printf("  %s  %s\n", s.bold(fmt.Sprintf("%-*s", grid, title)), s.bold(right))
		fmt.Printf("  %s\n", s.dim(fmt.Sprintf("%-*s  %s  %s", label, corner, columns, columns)))
		for _, from := range names {
			fmt.Printf("  %-*s  %s  %s\n", label, from, s.row(from, names, port, a), s.row(from, names, port, b))
		}
		fmt.Println()
	}
}

func (s style) row(from string, names []string, port port, m matrix) string {
	line := ""
	for _, to := range names {
		f := m[pair{from, to, port}]
		switch {
		case from == to:
			line += s.dim(cell("·"))
		case f.v4 && f.v6:
			line += s.green(cell("yes"))
		case f.v4:
			line += s.yellow(cell("v4 only"))
		case f.v6:
			line += s.yellow(cell("v6 only"))
		default:
			line += s.red(cell("no"))
		}
	}
	return line
}

func cell(text string) string { return fmt.Sprintf("%-*s", cellWidth, text) }
