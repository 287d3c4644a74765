// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/podgate/podgate/syncd/reach"
	"github.com/podgate/podgate/syncd/source"
)

// matrixFlags are those of the matrix command.
type matrixFlags struct {
	ports     []string
	parties   []string
	addresses []string
	manifests manifestFlags
}

// matrixReport is what podgate matrix prints.
type matrixReport struct {
	About   string   `json:"about"`
	Parties []string `json:"parties"`
	// Cells by port, then row, then column.
	Cells []matrixCell `json:"cells"`
	// Disagree is how many cells compiler and kernel differ on.
	Disagree int              `json:"disagree"`
	Caveats  []string         `json:"caveats,omitempty"`
	Problems []source.Problem `json:"problems,omitempty"`
}

type matrixCell struct {
	From     string `json:"from"`
	To       string `json:"to"`
	Port     string `json:"port"`
	Verdict  string `json:"verdict"`
	Disagree bool   `json:"disagree,omitempty"`
}

func (a *app) matrixCommand() *cobra.Command {
	var f matrixFlags
	cmd := &cobra.Command{
		Use:   "matrix --ports TCP/80,UDP/53",
		Short: "Show who can reach whom",
		Long: `Asks for every pod whether it may connect to every other on the ports named, as
podgate explain does for one pair: by the compiler and by the kernel. Addresses
stand for whoever else there is.

A cell is allow, deny, audit (passes, would be denied), v4 or v6 (that family
alone passes), mixed (some backends of a Service), or "-" where the two share no
family.

Exit code 2 if compiler and kernel differ, or if manifests have problems.`,
		Example: `  podgate matrix --ports TCP/80,UDP/53
  podgate matrix --ports 443 --address 203.0.113.7 --policy-dir ./policies`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.matrix(cmd.Context(), f) },
	}
	flags := cmd.Flags()
	flags.StringSliceVar(&f.ports, "ports", nil, "destination ports, each with protocol")
	flags.StringSliceVar(&f.parties, "pods", nil, "pods to ask about (default all)")
	flags.StringSliceVar(&f.addresses, "address", nil, "addresses to ask about as well")
	f.manifests.add(flags)
	if err := cmd.MarkFlagRequired("ports"); err != nil {
		panic(err) // a flag that does not exist
	}
	return cmd
}

func (a *app) matrix(ctx context.Context, f matrixFlags) (err error) {
	var ports []reach.Port
	for _, text := range f.ports {
		port, err := reach.ParsePort(text)
		if err != nil {
			return err
		}
		ports = append(ports, port)
	}
	q, err := a.questions(ctx, f.manifests)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, q.close()) }()
	parties, err := q.parties(f)
	if err != nil {
		return err
	}
	report := &matrixReport{About: q.subject, Parties: []string{}, Cells: []matrixCell{}, Caveats: q.caveats(), Problems: q.Problems}
	assumed := 0
	for _, p := range parties {
		report.Parties = append(report.Parties, p.Name)
		if q.Assumed(p.Addresses[0]) {
			assumed++
		}
	}
	if assumed > 0 {
		report.Caveats = append(report.Caveats, plural(assumed, "pod has", "pods have")+" no address in the manifests; one is assumed for each")
	}
	for _, port := range ports {
		for _, from := range parties {
			for _, to := range parties {
				cell, err := q.cell(ctx, from, to, port)
				if err != nil {
					return err
				}
				if cell.Disagree {
					report.Disagree++
				}
				report.Cells = append(report.Cells, cell)
			}
		}
	}
	if err := a.print(report, func(w *bytes.Buffer) { a.writeMatrix(w, report, ports) }); err != nil {
		return err
	}
	return q.outcome(report.Disagree > 0)
}

// parties are the pods asked about, then the addresses.
func (q *questions) parties(f matrixFlags) ([]reach.Party, error) {
	var out []reach.Party
	if len(f.parties) == 0 {
		out = q.Pods()
	}
	for _, name := range append(f.parties, f.addresses...) {
		p, err := q.Party(name)
		if err != nil {
			return nil, err
		}
		out = append(out, p)
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("%s: there are no pods", q.subject)
	}
	return out, nil
}

func (q *questions) cell(ctx context.Context, from, to reach.Party, port reach.Port) (matrixCell, error) {
	c := matrixCell{From: from.Name, To: to.Name, Port: port.String(), Verdict: "-"}
	if from.Pod == nil && to.Pod == nil {
		return c, nil
	}
	answer, err := q.Ask(ctx, from, to, port)
	if errors.Is(err, reach.ErrFamilies) {
		return c, nil
	}
	if err != nil {
		return c, err
	}
	c.Disagree = answer.Disagree()
	if v := answer.Verdict(); v != "" {
		c.Verdict = string(v)
		return c, nil
	}
	c.Verdict = familyWord(answer.Paths)
	return c, nil
}

// familyWord is the family that alone passes, of paths that differ.
func familyWord(paths []reach.Path) string {
	verdicts := make(map[bool]reach.Word)
	for _, p := range paths {
		v4 := p.From.Is4()
		if before, ok := verdicts[v4]; ok && before != p.Verdict {
			return mixed
		}
		verdicts[v4] = p.Verdict
	}
	switch {
	case verdicts[false] == reach.Deny:
		return "v4"
	case verdicts[true] == reach.Deny:
		return "v6"
	default:
		return mixed
	}
}

func (a *app) writeMatrix(w *bytes.Buffer, r *matrixReport, ports []reach.Port) {
	n := len(r.Parties)
	// Names make a header that fits only for a few.
	columns := r.Parties
	width := 0
	for _, p := range r.Parties {
		width += len(p) + 2
	}
	numbered := width*(n+1)/n > max(a.Width, 100)
	for i, port := range ports {
		if i > 0 {
			fmt.Fprintln(w)
		}
		rows := [][]cell{{{text: port.String()}}}
		for j, p := range columns {
			if numbered {
				p = fmt.Sprintf("[%d]", j+1)
			}
			rows[0] = append(rows[0], cell{text: p})
		}
		for j, p := range r.Parties {
			if numbered {
				p = fmt.Sprintf("[%d] %s", j+1, p)
			}
			line := []cell{{text: p}}
			for k := range n {
				c := r.Cells[(i*n+j)*n+k]
				text, s := c.Verdict, verdictStyle(c.Verdict)
				if c.Disagree {
					text, s = text+" !!", red
				}
				if c.Verdict == "-" {
					s = faint
				}
				line = append(line, cell{text, s})
			}
			rows = append(rows, line)
		}
		a.table(w, rows)
	}
	fmt.Fprintln(w)
	fmt.Fprintf(w, "%s\n", a.paint(faint, "rows connect to columns; about "+r.About))
	if r.Disagree > 0 {
		fmt.Fprintf(w, "%s\n", a.paint(red, "COMPILER AND KERNEL DISAGREE on "+plural(r.Disagree, "cell", "cells")+" (!!); ask podgate explain about them"))
	}
	for _, c := range r.Caveats {
		fmt.Fprintf(w, "%s %s\n", a.paint(yellow, "note:"), c)
	}
	a.writeProblems(w, r.Problems)
}
