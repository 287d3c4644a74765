// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package metrics

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/podgate/podgate/syncd/status"
)

// Health is how the daemon is, for who would restart it or wait for it.
type Health struct {
	mu   sync.Mutex
	last status.Status
}

// NewHealth is the health of a daemon that begins.
func NewHealth() *Health { return &Health{last: status.Status{Updated: time.Now()}} }

// Report replaces how the daemon is.
func (h *Health) Report(s status.Status) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.last = s
}

// Alive is an error when the daemon has said nothing for so long that it must
// hang. What is wrong with policy or kernel is no reason to restart it.
func (h *Health) Alive() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if silence := time.Since(h.last.Updated); silence > 3*status.Interval {
		return fmt.Errorf("no report for %s", silence.Round(time.Second))
	}
	return nil
}

// Ready is an error until what the source knew is in force. A policy that finds
// no room is no reason to wait: it is closed, named among the problems, and would
// hold up whoever replaces daemons one by one. Nor do later failures take it
// back: what was applied stays enforced.
func (h *Health) Ready() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.last.Applied.IsZero() {
		return nil
	}
	errs := []error{errors.New("nothing applied yet")}
	for _, p := range h.last.Problems {
		errs = append(errs, fmt.Errorf("%s: %s", p.Subject, p.Reason))
	}
	return errors.Join(errs...)
}
