// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package pinning

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
)

// A runtime may repeat an ADD on an interface that lives, and interface numbers
// are used again once an interface is gone. Either way the new endpoint takes
// the place of another. The hooks stay where they are: between the old gate and
// the new one they find none, and let nothing through.

// succeed takes away the endpoints that have the key or the interface of a new
// one, and returns those that leave it their hooks. The record of the key stays
// for it to overwrite: DEL finds the hooks by it, whatever happens.
func (s *State) succeed(r *AddRequest) (forebears []*Endpoint, err error) {
	former, err := s.find(r.Key)
	if err != nil {
		return nil, err
	}
	if former != nil {
		if former.Interfaces != 1 {
			// Its others are there still.
			r.Interfaces = 0
		}
		if err := s.shut(former); err != nil {
			return nil, err
		}
		if former.HostIfindex == r.HostIfindex {
			forebears = append(forebears, former)
		} else if err := s.unhook(former); err != nil {
			return nil, err
		}
		if err := s.disown(former); err != nil {
			return nil, err
		}
	}
	other, err := s.gated(r.HostIfindex)
	if err != nil || other == nil {
		return forebears, err
	}
	if err := errors.Join(s.shut(other), s.disown(other), s.forget(other.Key)); err != nil {
		return nil, err
	}
	return append(forebears, other), nil
}

// gated is the endpoint whose gate an interface has, or nil.
func (s *State) gated(ifindex int) (*Endpoint, error) {
	sh, err := s.memory()
	if err != nil {
		return nil, err
	}
	if _, taken, err := sh.slotFor(uint32(ifindex)); err != nil || !taken {
		return nil, err
	}
	for e, err := range s.Endpoints() {
		if err != nil {
			return nil, err
		}
		if e.HostIfindex == ifindex {
			return &e, nil
		}
	}
	return nil, nil
}

// inherit hands the pins of tcx links on.
func (s *State) inherit(e *Endpoint, forebears []*Endpoint) error {
	for _, f := range forebears {
		err := os.Rename(s.layout.endpointLinks(f.ID), s.layout.endpointLinks(e.ID))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("hand links on: %w", err)
		}
	}
	return nil
}

// detachOther takes off the hooks of the kind that an endpoint has inherited
// and does not use.
func (s *State) detachOther(e *Endpoint) error {
	if e.Attach == AttachTCX {
		return detachClsact(e.HostIfindex)
	}
	return s.detachTCX(e.ID)
}
