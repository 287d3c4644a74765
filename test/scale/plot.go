// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"image/color"
	"path/filepath"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
)

// line is one of a figure.
type line struct {
	name string
	y    func(result) float64
}

// figure is measured against the number of pods.
type figure struct {
	file, title, unit string
	lines             []line
}

func figures() []figure {
	mb := func(n int64) float64 { return float64(n) / (1 << 20) }
	return []figure{
		{"memory.svg", "Memory of podgate sync", "MB", []line{
			{"RSS at rest", func(r result) float64 { return mb(r.RSS) }},
			{"RSS under churn", func(r result) float64 { return mb(r.ChurnRSS) }},
			{"most at any time", func(r result) float64 { return mb(r.Peak) }},
		}},
		{"latency.svg", "From an event to the kernel's verdict", "ms", []line{
			{"p50", func(r result) float64 { return r.Latency.P50 }},
			{"p99", func(r result) float64 { return r.Latency.P99 }},
		}},
		{"cpu.svg", "Processor time", "% of one CPU, or seconds", []line{
			{"under churn, %", func(r result) float64 { return 100 * r.CPU }},
			{"to start, s", func(r result) float64 { return r.StartCPU }},
		}},
		{"server.svg", "What it costs the API server", "MB, or MB/s", []line{
			{"to start, MB", func(r result) float64 { return mb(r.StartBytes) }},
			{"under churn, MB/s", func(r result) float64 { return r.Bytes / (1 << 20) }},
		}},
	}
}

// plotAll draws the figures into a directory.
func plotAll(results []result, dir string) error {
	colours := []color.Color{color.RGBA{0x1f, 0x77, 0xb4, 255}, color.RGBA{0xd6, 0x27, 0x28, 255}, color.RGBA{0x7f, 0x7f, 0x7f, 255}}
	for _, f := range figures() {
		p := plot.New()
		p.BackgroundColor = color.White
		p.Title.Text, p.X.Label.Text, p.Y.Label.Text = f.title, "pods in the cluster", f.unit
		p.X.Min, p.Y.Min = 0, 0
		p.Legend.Top, p.Legend.Left = true, true
		p.Add(plotter.NewGrid())
		for i, l := range f.lines {
			var at plotter.XYs
			for _, r := range results {
				at = append(at, plotter.XY{X: float64(r.Pods), Y: l.y(r)})
			}
			curve, points, err := plotter.NewLinePoints(at)
			if err != nil {
				return err
			}
			curve.Color, points.Color = colours[i], colours[i]
			p.Add(curve, points)
			p.Legend.Add(l.name, curve, points)
		}
		if err := p.Save(14*vg.Centimeter, 8*vg.Centimeter, filepath.Join(dir, f.file)); err != nil {
			return err
		}
	}
	return nil
}
