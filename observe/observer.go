// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package observe

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/podgate/podgate/bpf/flow"
	"github.com/podgate/podgate/observe/history"
	"github.com/podgate/podgate/observe/naming"
	"github.com/podgate/podgate/pinning"
)

// Options of an [Observer].
type Options struct {
	// State says which instance to observe. It need not be there yet.
	State pinning.Options
	Names *naming.Table
	Ring  *history.Ring
	// Saw, if set, is told of records after they are in the ring, by the goroutine
	// of Run. It may not keep the slice.
	Saw    func([]history.Record)
	Logger *slog.Logger
}

// Observer is the one consumer of an instance's events.
type Observer struct {
	opts Options

	mu      sync.Mutex
	reading error // why nothing is read; nil while events are
	looked  time.Time
}

// errStarting is why nothing is read at first.
var errStarting = errors.New("starting")

// New is an observer that has not begun.
func New(o Options) *Observer {
	return &Observer{opts: o, reading: errStarting, looked: time.Now()}
}

// batch is how many events are named and handed on together.
const batch = 1024

// retry is how often it is tried to begin.
const retry = time.Second

// Run observes until ctx is done. While there is nothing to observe, or somebody
// else consumes the events, it waits.
func (o *Observer) Run(ctx context.Context) error {
	var last string
	for {
		err := o.observe(ctx)
		if ctx.Err() != nil {
			return nil
		}
		o.report(err)
		if why := err.Error(); why != last {
			o.opts.Logger.Warn("events are not read", "error", err)
			last = why
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(retry):
		}
	}
}

// errReplaced says that the instance is not the one that was opened.
var errReplaced = errors.New("the pinned state was replaced")

// observe reads one state until ctx is done or the state is no longer the
// instance's.
func (o *Observer) observe(ctx context.Context) (err error) {
	dir := o.opts.State.Layout.VersionDir()
	made, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("%w: %w", pinning.ErrNotInstalled, err)
	}
	// Each has a state of its own: a state is used by one goroutine at a time.
	events, err := pinning.Open(ctx, o.opts.State)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, events.Close()) }()
	names, err := pinning.Open(ctx, o.opts.State)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, names.Close()) }()
	reader, err := events.Events(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, reader.Close()) }()
	lost, err := reader.Lost()
	if err != nil {
		return err
	}
	// The watch ends before its state does.
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	changes, err := events.Watch(ctx)
	if err != nil {
		return err
	}
	o.opts.Names.Use(names)
	defer o.opts.Names.Use(nil)
	o.opts.Logger.Info("reading events", "instance", dir)
	p := pump{Observer: o, reader: reader, lost: lost, since: time.Now()}
	for {
		select {
		case <-changes:
			o.opts.Names.Touch()
			if now, err := os.Stat(dir); err != nil || !os.SameFile(made, now) {
				return errReplaced
			}
		default:
		}
		if err := p.step(ctx); err != nil {
			return err
		}
		o.report(nil)
	}
}

// pump moves events from the kernel's ring to ours.
type pump struct {
	*Observer
	reader  *flow.Reader
	flows   [batch]flow.Flow
	names   [batch]naming.Names
	records [batch + 1]history.Record
	lost    uint64
	since   time.Time // when it was last known what was lost
}

// lostInterval is how often it is looked for events that were lost.
const lostInterval = time.Second

// step moves what there is, waiting for it for a moment.
func (p *pump) step(ctx context.Context) error {
	n, skipped, err := p.reader.ReadBatch(ctx, p.flows[:])
	if err != nil {
		return err
	}
	if skipped > 0 {
		p.opts.Logger.Warn("events left out: they are too short", "count", skipped)
	}
	now := time.Now()
	records := p.records[:0]
	if err := p.opts.Names.Name(now, p.flows[:n], p.names[:n]); err != nil {
		p.opts.Logger.Warn("not everything could be read that names events", "error", err)
	}
	for i := range n {
		records = append(records, history.Record{Event: p.flows[i], Names: p.names[i]})
	}
	if now.Sub(p.since) >= lostInterval {
		lost, err := p.reader.Lost()
		if err != nil {
			return err
		}
		if lost > p.lost {
			records = append(records, history.Record{Event: flow.Flow{Time: now}, Lost: lost - p.lost, Since: p.since})
		}
		p.lost, p.since = lost, now
	}
	p.opts.Ring.Append(records...)
	if p.opts.Saw != nil && len(records) > 0 {
		p.opts.Saw(records)
	}
	return nil
}

func (o *Observer) report(err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.reading, o.looked = err, time.Now()
}

// Ready is an error while no events are read.
func (o *Observer) Ready() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.reading
}

// hung is after what time without a sign of life the observer must hang.
const hung = time.Minute

// Alive is an error when the observer hangs.
func (o *Observer) Alive() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if silence := time.Since(o.looked); silence > hung {
		return fmt.Errorf("no sign of life for %s", silence.Round(time.Second))
	}
	return nil
}
