// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"unique"
)

// nameLabel is the label every namespace has: the API server sets it, and a
// namespace nobody described is taken to have it and no other.
const nameLabel = "kubernetes.io/metadata.name"

// label is a label whose strings are interned: thousands of pods share them,
// and comparing two is comparing two pointers.
type label struct{ key, value unique.Handle[string] }

// labelSet is sorted by key.
type labelSet []label

func makeLabels(m map[string]string) labelSet {
	s := make(labelSet, 0, len(m))
	for k, v := range m {
		s = append(s, label{unique.Make(k), unique.Make(v)})
	}
	slices.SortFunc(s, func(a, b label) int { return cmp.Compare(a.key.Value(), b.key.Value()) })
	return s
}

func (s labelSet) get(key unique.Handle[string]) (unique.Handle[string], bool) {
	for _, l := range s {
		if l.key == key {
			return l.value, true
		}
	}
	return unique.Handle[string]{}, false
}

func (s labelSet) encode(e encoding) encoding {
	e = e.number(uint64(len(s)))
	for _, l := range s {
		e = e.text(l.key.Value()).text(l.value.Value())
	}
	return e
}

// requirement is a checked [Requirement] with sorted, distinct values.
type requirement struct {
	key      unique.Handle[string]
	operator Operator
	values   []unique.Handle[string]
}

func (r requirement) matches(s labelSet) bool {
	value, ok := s.get(r.key)
	switch r.operator {
	case In:
		return ok && slices.Contains(r.values, value)
	case NotIn:
		return !ok || !slices.Contains(r.values, value)
	case Exists:
		return ok
	default:
		return !ok
	}
}

// selector is a checked [Selector].
type selector struct {
	digest       Digest
	requirements []requirement
}

func (s selector) matches(l labelSet) bool {
	for _, r := range s.requirements {
		if !r.matches(l) {
			return false
		}
	}
	return true
}

func makeSelector(in Selector) (selector, error) {
	var s selector
	digests := make([]Digest, 0, len(in))
	for i, r := range in {
		if err := r.check(); err != nil {
			return selector{}, fmt.Errorf("requirement %d: %w", i, err)
		}
		values := slices.Clone(r.Values)
		slices.Sort(values)
		values = slices.Compact(values)

		e := encode("requirement").text(r.Key).number(uint64(r.Operator)).number(uint64(len(values)))
		q := requirement{key: unique.Make(r.Key), operator: r.Operator}
		for _, v := range values {
			e = e.text(v)
			q.values = append(q.values, unique.Make(v))
		}
		digests = append(digests, e.sum())
		s.requirements = append(s.requirements, q)
	}
	s.digest = encode("selector").set(digests).sum()
	return s, nil
}

func (r Requirement) check() error {
	if r.Key == "" {
		return errors.New("key: must not be empty")
	}
	switch r.Operator {
	case In, NotIn:
		if len(r.Values) == 0 {
			return fmt.Errorf("label %q: values: In and NotIn need at least one", r.Key)
		}
	case Exists, DoesNotExist:
		if len(r.Values) > 0 {
			return fmt.Errorf("label %q: values: Exists and DoesNotExist take none", r.Key)
		}
	default:
		return fmt.Errorf("label %q: operator: %d is unknown", r.Key, r.Operator)
	}
	return nil
}

// podSelector is a checked [PodSelector].
type podSelector struct {
	digest           Digest
	namespace        string
	namespaces, pods selector
}

func makePodSelector(in PodSelector) (*podSelector, error) {
	s := &podSelector{namespace: in.Namespace}
	var err error
	if in.Namespace == "" {
		if s.namespaces, err = makeSelector(in.Namespaces); err != nil {
			return nil, fmt.Errorf("namespaces: %w", err)
		}
	}
	if s.pods, err = makeSelector(in.Pods); err != nil {
		return nil, fmt.Errorf("pods: %w", err)
	}
	s.digest = encode("pods").text(s.namespace).digest(s.namespaces.digest).digest(s.pods.digest).sum()
	return s, nil
}

// covers says whether pods of a namespace can match at all.
func (s *podSelector) covers(ns *namespace) bool {
	if s.namespace != "" {
		return s.namespace == ns.name
	}
	return s.namespaces.matches(ns.labels)
}

func (s *podSelector) matches(p *profile) bool {
	return s.covers(p.namespace) && s.pods.matches(p.labels)
}
