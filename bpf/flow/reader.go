// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package flow

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"
	"golang.org/x/sys/unix"
)

// poll is how often the ring is looked at: the datapath wakes nobody for a
// single record, since that would cost far more than the record.
const poll = 50 * time.Millisecond

// NewClock relates CLOCK_MONOTONIC to the wall clock of now.
func NewClock() (Clock, error) {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		return Clock{}, fmt.Errorf("read the clock: %w", err)
	}
	return Clock{boot: time.Now().Add(-time.Duration(ts.Nano())).Round(0)}, nil
}

// At is the wall-clock time of a kernel time in nanoseconds.
func (c Clock) At(ns uint64) time.Time { return c.boot.Add(time.Duration(ns)) }

// Reader consumes the event ring. A ring has one consumer.
type Reader struct {
	ring   *ringbuf.Reader
	clock  Clock
	lost   *ebpf.Map
	record ringbuf.Record
	closed func() error
}

// NewReader reads events; lost is the map that counts those the full ring did
// not take. closed, if not nil, is called by Close.
func NewReader(events, lost *ebpf.Map, closed func() error) (*Reader, error) {
	clock, err := NewClock()
	if err != nil {
		return nil, err
	}
	ring, err := ringbuf.NewReader(events)
	if err != nil {
		return nil, fmt.Errorf("open the event ring: %w", err)
	}
	return &Reader{ring: ring, clock: clock, lost: lost, closed: closed}, nil
}

// Read returns the next event, waiting for one until ctx is done. A record
// that cannot be decoded is returned as an error; the next call goes on.
func (r *Reader) Read(ctx context.Context) (Flow, error) {
	for {
		if err := ctx.Err(); err != nil {
			return Flow{}, err
		}
		r.ring.SetDeadline(time.Now().Add(poll))
		err := r.ring.ReadInto(&r.record)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			continue
		}
		if err != nil {
			return Flow{}, fmt.Errorf("read the event ring: %w", err)
		}
		return Decode(r.record.RawSample, r.clock)
	}
}

// ReadBatch fills flows with what is in the ring, waiting for the first event
// for a twentieth of a second at most; it may return none. Records that cannot
// be decoded are counted as skipped.
func (r *Reader) ReadBatch(ctx context.Context, flows []Flow) (n, skipped int, err error) {
	if err := ctx.Err(); err != nil {
		return 0, 0, err
	}
	r.ring.SetDeadline(time.Now().Add(poll))
	for n < len(flows) {
		err := r.ring.ReadInto(&r.record)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return n, skipped, nil
		}
		if err != nil {
			return n, skipped, fmt.Errorf("read the event ring: %w", err)
		}
		if n+skipped == 0 {
			r.ring.SetDeadline(time.Unix(1, 0)) // do not wait for more
		}
		if flows[n], err = Decode(r.record.RawSample, r.clock); err != nil {
			skipped++
			continue
		}
		n++
	}
	return n, skipped, nil
}

// Lost is how many events the full ring did not take since it was made.
func (r *Reader) Lost() (uint64, error) {
	var perCPU []uint64
	if err := r.lost.Lookup(uint32(0), &perCPU); err != nil {
		return 0, fmt.Errorf("read lost events: %w", err)
	}
	var n uint64
	for _, x := range perCPU {
		n += x
	}
	return n, nil
}

// Close ends the reading. Events stay in the ring for the next reader.
func (r *Reader) Close() error {
	err := r.ring.Close()
	if r.closed != nil {
		err = errors.Join(err, r.closed())
	}
	return err
}
