// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package flow_test

import (
	"context"
	"errors"
	"os"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"github.com/podgate/podgate/bpf/flow"
)

func newMap(t *testing.T, spec ebpf.MapSpec) *ebpf.Map {
	t.Helper()
	m, err := ebpf.NewMap(&spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = m.Close() })
	return m
}

func TestReader(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("eBPF maps need root")
	}
	ring := newMap(t, ebpf.MapSpec{Type: ebpf.RingBuf, MaxEntries: 4096})
	lost := newMap(t, ebpf.MapSpec{Type: ebpf.PerCPUArray, KeySize: 4, ValueSize: 8, MaxEntries: 1})
	closed := errors.New("closed")
	r, err := flow.NewReader(ring, lost, func() error { return closed })
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, err := r.Read(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Read of an empty ring: %v", err)
	}
	counts := make([]uint64, ebpf.MustPossibleCPU())
	for i := range counts {
		counts[i] = 3
	}
	if err := lost.Put(uint32(0), counts); err != nil {
		t.Fatal(err)
	}
	if n, err := r.Lost(); err != nil || n != uint64(3*len(counts)) {
		t.Errorf("lost are %d, %v", n, err)
	}
	if err := r.Close(); !errors.Is(err, closed) {
		t.Errorf("Close: %v", err)
	}
	if _, err := r.Read(t.Context()); err == nil {
		t.Error("Read after Close has no error")
	}
	if _, err := flow.NewReader(lost, lost, nil); err == nil {
		t.Error("a map that is no ring is read")
	}
}
