// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package bench

import (
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
	"text/tabwriter"
	"time"
)

// series is a figure that is measured many times, in turns with others, so
// that what disturbs the machine disturbs all of them.
type series struct {
	name string
	// sample takes one sample.
	sample func() (time.Duration, error)
	target
	// overhead is what the way of measuring adds, as with over - bare.
	over, bare *series

	samples []time.Duration
}

// target is at most so many times, or so much more than, the median of a floor
// of the same run.
type target struct {
	floor *series
	times float64
	more  time.Duration
}

// measure takes rounds samples of each series in turns, each time in another
// order: what runs before a series leaves it warm or cold caches.
func measure(rounds int, all []*series) error {
	order, random := slices.Clone(all), rand.New(rand.NewPCG(1, 2))
	for range rounds {
		random.Shuffle(len(order), func(i, j int) { order[i], order[j] = order[j], order[i] })
		for _, s := range order {
			d, err := s.sample()
			if err != nil {
				return fmt.Errorf("%s: %w", s.name, err)
			}
			s.samples = append(s.samples, d)
		}
	}
	for _, s := range all {
		slices.Sort(s.samples)
	}
	return nil
}

// quantile of what is measured, less its overhead.
func (s *series) quantile(q float64) time.Duration {
	d := s.samples[int(q*float64(len(s.samples)-1))]
	if s.over != nil {
		d -= s.over.quantile(0.5) - s.bare.quantile(0.5)
	}
	return d
}

func (s *series) median() time.Duration { return s.quantile(0.5) }

func (s *series) ratio() float64 { return float64(s.median()) / float64(s.floor.median()) }

// verdict is empty for what has no target.
func (s *series) verdict() string {
	var ok bool
	switch {
	case s.times != 0:
		ok = s.ratio() <= s.times
	case s.more != 0:
		ok = s.median()-s.floor.median() <= s.more
	default:
		return ""
	}
	if ok {
		return "PASS"
	}
	return "MISS"
}

func (s *series) row(unit time.Duration) string {
	in := func(d time.Duration) string { return fmt.Sprintf("%.*f", digits(unit), float64(d)/float64(unit)) }
	row := []string{s.name, in(s.median()), in(s.quantile(0.1)), in(s.quantile(0.9)), "", "", "", ""}
	if s.floor != nil {
		row[4], row[5] = s.floor.name, fmt.Sprintf("%.2f x", s.ratio())
		if s.more != 0 {
			row[5] = fmt.Sprintf("%+.*f", digits(unit), float64(s.median()-s.floor.median())/float64(unit))
		}
	}
	if s.times != 0 {
		row[6] = fmt.Sprintf("%.1f x", s.times)
	} else if s.more != 0 {
		row[6] = "+" + in(s.more)
	}
	row[7] = s.verdict()
	return strings.Join(row, "\t")
}

// digits worth printing.
func digits(unit time.Duration) int {
	return int(math.Log10(float64(unit)) / 3)
}

// report prints a table for people and the same as benchmark results for tools.
func report(b *testing.B, title string, unit time.Duration, all []*series) {
	b.Helper()
	rows := []string{fmt.Sprintf("\n%s, %s\tmedian\tp10\tp90\tagainst\tis\ttarget\t", title, unit.String()[1:])}
	for _, s := range all {
		rows = append(rows, s.row(unit))
	}
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	_, err := fmt.Fprintln(w, strings.Join(rows, "\n")+"\n")
	if err := errors.Join(err, w.Flush()); err != nil {
		b.Fatal(err)
	}
	for _, s := range all {
		b.Run(strings.ReplaceAll(s.name, " ", "-"), func(b *testing.B) {
			b.ReportMetric(float64(s.median()), "ns/op")
			if s.floor != nil {
				b.ReportMetric(s.ratio(), "x")
			}
		})
	}
}
