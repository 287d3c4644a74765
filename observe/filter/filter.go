// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

// Package filter decides which flows a client of Hubble's API asked for.
//
// The meaning of each field is that of flow.FlowFilter in Hubble's API
// (github.com/cilium/cilium/api/v1/flow). Hubble's own filters are not linked:
// with them come an etcd client, a state database and a hundred other packages.
// They are what the tests compare with.
package filter

import (
	"errors"
	"fmt"
	"slices"

	flowpb "github.com/cilium/cilium/api/v1/flow"
)

// ErrUnsupported is returned for a filter of the API that this server does not
// have.
var ErrUnsupported = errors.New("not supported")

// Func tells whether a flow is wanted.
type Func func(*flowpb.Flow) bool

// New is a filter for flows that match one of allow, if there are any, and none
// of deny. The error names the field that is wrong.
func New(allow, deny []*flowpb.FlowFilter) (Func, error) {
	wanted, err := list("whitelist", allow)
	if err != nil {
		return nil, err
	}
	unwanted, err := list("blacklist", deny)
	if err != nil {
		return nil, err
	}
	return func(f *flowpb.Flow) bool {
		one := func(match Func) bool { return match(f) }
		return (len(wanted) == 0 || slices.ContainsFunc(wanted, one)) && !slices.ContainsFunc(unwanted, one)
	}, nil
}

func list(name string, filters []*flowpb.FlowFilter) ([]Func, error) {
	out := make([]Func, 0, len(filters))
	for i, f := range filters {
		match, err := all(f)
		if err != nil {
			return nil, fmt.Errorf("%s[%d]: %w", name, i, err)
		}
		out = append(out, match)
	}
	return out, nil
}

// criterion is one field of a FlowFilter; build answers nil if it is not set.
type criterion struct {
	field string
	build func(*flowpb.FlowFilter) (Func, error)
}

// all is a filter for flows that match every field that is set.
func all(f *flowpb.FlowFilter) (Func, error) {
	var set []Func
	for _, c := range criteria() {
		match, err := c.build(f)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", c.field, err)
		}
		if match != nil {
			set = append(set, match)
		}
	}
	return func(f *flowpb.Flow) bool {
		return !slices.ContainsFunc(set, func(match Func) bool { return !match(f) })
	}, nil
}

// is matches flows of which a field has one of some values.
func is[T comparable](want []T, get func(*flowpb.Flow) T) (Func, error) {
	if len(want) == 0 {
		return nil, nil
	}
	return func(f *flowpb.Flow) bool { return slices.Contains(want, get(f)) }, nil
}

// either matches flows that one of some wishes is true of.
func either[T any](want []T, match func(*flowpb.Flow, T) bool) (Func, error) {
	if len(want) == 0 {
		return nil, nil
	}
	return func(f *flowpb.Flow) bool {
		return slices.ContainsFunc(want, func(w T) bool { return match(f, w) })
	}, nil
}

// parsed is either for wishes that are made of text.
func parsed[T any](texts []string, parse func(string) (T, error), match func(*flowpb.Flow, T) bool) (Func, error) {
	want := make([]T, 0, len(texts))
	for _, text := range texts {
		w, err := parse(text)
		if err != nil {
			return nil, fmt.Errorf("%q: %w", text, err)
		}
		want = append(want, w)
	}
	return either(want, match)
}
