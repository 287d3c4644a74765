// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package hubble

import (
	"cmp"
	"errors"
	"maps"
	"slices"
	"time"

	flowpb "github.com/cilium/cilium/api/v1/flow"
	observerpb "github.com/cilium/cilium/api/v1/observer"
	"github.com/cilium/cilium/pkg/hubble/parser/fieldmask"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/podgate/podgate/observe/filter"
	"github.com/podgate/podgate/observe/history"
)

// chunk is how many records are copied out of the ring at once.
const chunk = 64

// lostInterval is how often at most a client hears that it was too slow.
const lostInterval = time.Second

// query is a GetFlowsRequest that has been understood.
type query struct {
	*observerpb.GetFlowsRequest
	wants        filter.Func
	since, until time.Time // zero if not set
	mask         fieldmask.FieldMask
}

func (s *Server) query(req *observerpb.GetFlowsRequest) (*query, error) {
	invalid := func(err error) error { return status.Error(codes.InvalidArgument, err.Error()) }
	if req.GetFirst() && req.GetFollow() {
		return nil, invalid(errors.New("first cannot be specified with follow"))
	}
	q := &query{GetFlowsRequest: req}
	for _, t := range []struct {
		from *timestamppb.Timestamp
		to   *time.Time
	}{{req.GetSince(), &q.since}, {req.GetUntil(), &q.until}} {
		if t.from == nil {
			continue
		}
		if err := t.from.CheckValid(); err != nil {
			return nil, invalid(err)
		}
		*t.to = t.from.AsTime()
	}
	var err error
	if q.wants, err = filter.New(req.GetWhitelist(), req.GetBlacklist()); err != nil {
		if errors.Is(err, filter.ErrUnsupported) {
			return nil, status.Error(codes.Unimplemented, err.Error())
		}
		return nil, invalid(err)
	}
	if q.mask, err = fieldmask.New(req.GetFieldMask()); err != nil {
		return nil, invalid(err)
	}
	return q, nil
}

// GetFlows implements Hubble's API.
func (s *Server) GetFlows(req *observerpb.GetFlowsRequest, stream grpc.ServerStreamingServer[observerpb.GetFlowsResponse]) error {
	q, err := s.query(req)
	if err != nil {
		return err
	}
	var (
		at       = s.start(q)
		sent     uint64
		records  [chunk]history.Record
		missed   uint64
		since    time.Time
		reported time.Time
		masked   = new(flowpb.Flow)
	)
	if q.mask.Active() {
		q.mask.Alloc(masked.ProtoReflect())
	}
	for {
		_, next, grown := s.ring.Bounds()
		n, skipped := s.ring.Read(at, records[:])
		if at += skipped; skipped > 0 {
			if missed += skipped; since.IsZero() {
				since = time.Now()
			}
		}
		if now := time.Now(); missed > 0 && now.Sub(reported) >= lostInterval {
			if err := stream.Send(s.lostEvent(flowpb.LostEventSource_HUBBLE_RING_BUFFER, missed, since, now)); err != nil {
				return err
			}
			missed, since, reported = 0, time.Time{}, now
		}
		for i := range records[:n] {
			r := &records[i]
			at++
			if r.Lost > 0 {
				if err := stream.Send(s.lostEvent(flowpb.LostEventSource_PERF_EVENT_RING_BUFFER, r.Lost, r.Since, r.Event.Time)); err != nil {
					return err
				}
				continue
			}
			if !q.until.IsZero() && r.Event.Time.After(q.until) {
				return nil
			}
			if r.Event.Time.Before(q.since) {
				continue
			}
			f := s.flow(r, at)
			if !q.wants(f) {
				continue
			}
			if q.mask.Active() {
				q.mask.Copy(masked.ProtoReflect(), f.ProtoReflect())
				f = masked
			}
			if err := stream.Send(&observerpb.GetFlowsResponse{
				Time: f.GetTime(), NodeName: f.GetNodeName(), ResponseTypes: &observerpb.GetFlowsResponse_Flow{Flow: f},
			}); err != nil {
				return err
			}
			if sent++; !q.GetFollow() && sent == q.GetNumber() {
				return nil
			}
		}
		if at < next {
			continue
		}
		if !q.GetFollow() {
			return nil
		}
		var wait <-chan time.Time
		if missed > 0 {
			wait = time.After(lostInterval)
		}
		select {
		case <-stream.Context().Done():
			return nil
		case <-grown:
		case <-wait:
		}
	}
}

// start is the number of the record to begin with.
func (s *Server) start(q *query) uint64 {
	oldest, next, _ := s.ring.Bounds()
	switch {
	case q.GetFirst() && q.since.IsZero():
		return oldest
	case q.GetFollow() && q.GetNumber() == 0 && q.since.IsZero():
		return next
	case q.GetNumber() == 0 && q.since.IsZero():
		return oldest
	}
	var record [1]history.Record
	var count uint64
	for at := next; at > oldest; at-- {
		if n, missed := s.ring.Read(at-1, record[:]); n == 0 || missed > 0 {
			return at
		}
		r := &record[0]
		switch {
		case r.Lost > 0:
		case !q.since.IsZero():
			if r.Event.Time.Before(q.since) {
				return at
			}
		case (q.until.IsZero() || !r.Event.Time.After(q.until)) && q.wants(s.flow(r, at)):
			if count++; count == q.GetNumber() {
				return at - 1
			}
		}
	}
	return oldest
}

func stamp(t time.Time) *timestamppb.Timestamp { return timestamppb.New(t) }

func sortedKeys[K cmp.Ordered, V any](m map[K]V) []K { return slices.Sorted(maps.Keys(m)) }
