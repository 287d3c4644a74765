// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package pinning

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
)

// batchSize is how many entries one syscall writes: enough to make its cost
// vanish, few enough to redo one by one when the map is full.
const batchSize = 1024

// batch gathers entries for one map.
type batch[K, V any] struct {
	m      *ebpf.Map
	keys   []K
	values []V
}

func (b *batch[K, V]) add(k K, v V) {
	b.keys = append(b.keys, k)
	b.values = append(b.values, v)
}

// flush writes what was gathered. Entries that could not be written are
// returned by their position.
func (b *batch[K, V]) flush() map[int]error {
	defer func() { b.keys, b.values = b.keys[:0], b.values[:0] }()
	if len(b.keys) == 0 {
		return nil
	}
	if _, err := b.m.BatchUpdate(b.keys, b.values, nil); err == nil {
		return nil
	}
	failed := map[int]error{}
	for i := range b.keys {
		if err := put(b.m, &b.keys[i], &b.values[i]); err != nil {
			failed[i] = err
		}
	}
	return failed
}

// readSize is how many entries one syscall reads.
const readSize = 4 * batchSize

// readBatches reads a whole hash into slices of readSize keys and values, and
// says how many there are each time. It is false where the kernel cannot.
func readBatches(m *ebpf.Map, keys, values any, took func(n int)) bool {
	var cursor ebpf.MapBatchCursor
	for {
		n, err := m.BatchLookup(&cursor, keys, values, nil)
		if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return false
		}
		if took(n); err != nil {
			return true
		}
	}
}

// dump reads a whole hash, many entries at a time where the kernel can.
func dump[K comparable, V any](m *ebpf.Map) (map[K]V, error) {
	out := map[K]V{}
	keys, values := make([]K, readSize), make([]V, readSize)
	if readBatches(m, keys, values, func(n int) {
		for i := range n {
			out[keys[i]] = values[i]
		}
	}) {
		return out, nil
	}
	var err error
	for k, v := range each[K, V](m, &err) {
		out[k] = v
	}
	return out, err
}

// sweepKeys removes the entries that are not to be kept.
func sweepKeys[K comparable](m *ebpf.Map, keep func(K) bool) error {
	keys, err := keysOf[K](m)
	if err != nil {
		return err
	}
	for _, k := range keys {
		if keep(k) {
			continue
		}
		if err := remove(m, &k); err != nil {
			return fmt.Errorf("sweep: %w", err)
		}
	}
	return nil
}
