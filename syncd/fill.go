// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package syncd

import (
	"context"
	"log/slog"

	"github.com/podgate/podgate/pinning"
)

// fill is how full the kernel's maps are, as of the last look. What it means
// for who reads podgate status is said there, daemon or not.
type fill struct {
	log   *slog.Logger
	usage []pinning.MapUsage
	// levels are those last logged, by map.
	levels map[string]slog.Level
}

func newFill(log *slog.Logger) fill {
	return fill{log: log, levels: make(map[string]slog.Level)}
}

// look takes a new usage and logs what crossed a threshold since the last.
func (f *fill) look(ctx context.Context, usage []pinning.MapUsage) {
	f.usage = usage
	for _, u := range usage {
		if u.Used < 0 {
			continue
		}
		level := slog.LevelInfo
		switch full := u.Full(); {
		case full >= pinning.FillUrgent:
			level = slog.LevelError
		case full >= pinning.FillWarning:
			level = slog.LevelWarn
		}
		before := f.levels[u.Name]
		if f.levels[u.Name] = level; level == before {
			continue
		}
		text := "map fills up: " + u.Consequence()
		if level < before {
			text = "map has more room again"
		}
		f.log.Log(ctx, level, text, "map", u.Name, "used", u.Used, "max", u.Max)
	}
}

// measure looks at how full the maps are.
func (d *Daemon) measure(ctx context.Context) {
	usage, err := d.opts.State.Usage()
	d.problems.set("usage", "maps", err)
	if err == nil {
		d.fill.look(ctx, usage)
	}
}

// states counts the endpoints by what their gates do.
func (d *Daemon) states() map[string]int {
	out := make(map[string]int)
	for _, ep := range d.endpoints {
		// An endpoint whose gate is not its own lets nothing through.
		enforced, err := d.opts.State.Enforcement(ep)
		if err != nil {
			enforced = pinning.Enforcement{}
		}
		out[enforced.State()]++
	}
	return out
}
