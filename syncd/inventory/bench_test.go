// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package inventory

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/podgate/podgate/bpf/policy"
	"github.com/podgate/podgate/pinning"
	"github.com/podgate/podgate/syncd/manifest"
	"github.com/podgate/podgate/syncd/source"
)

// benchPod is one of many: 100 on this node, the rest on others, in 100
// namespaces with ten applications each.
func benchPod(i int, label string) manifest.Object {
	name, uid := fmt.Sprintf("app-%d-%d", i%10, i), fmt.Sprintf("uid-%d", i)
	pod := &policy.Pod{
		Key: policy.PodKey(uid), UID: uid, Namespace: fmt.Sprintf("ns-%d", i%100), Name: name,
		Labels:    map[string]string{"app": fmt.Sprintf("app-%d", i%10), "pod-template-hash": "5d4f8c7b9", "l": label},
		Addresses: []netip.Addr{netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)})},
	}
	node := fmt.Sprintf("n%d", i/100)
	return manifest.Object{Key: manifest.Key{Kind: manifest.KindPod, Namespace: pod.Namespace, Name: name}, Pod: pod, Node: node}
}

// BenchmarkUpdate is what one pod elsewhere costs that comes, and another that
// goes, in clusters of several sizes.
func BenchmarkUpdate(b *testing.B) {
	for _, n := range []int{1_000, 10_000, 100_000} {
		b.Run(fmt.Sprintf("pods=%d", n), func(b *testing.B) {
			inv, compiler := New(Options{Node: "n1"}), policy.NewCompiler()
			var all source.Batch
			for i := range n {
				all.Set = append(all.Set, benchPod(i, ""))
			}
			inv.Apply(all)
			var endpoints []pinning.Endpoint
			for i := 100; i < 200; i++ {
				p := all.Set[i].Pod
				endpoints = append(endpoints, endpoint(uint32(i), fmt.Sprintf("c%d", i), p.UID, p.Namespace+"/"+p.Name, nil, p.Addresses[0].String()))
			}
			inv.SetEndpoints(endpoints)
			inv.Update(compiler)
			compiler.Compile()
			b.ReportAllocs()
			i := 0
			for b.Loop() {
				i++
				inv.Apply(source.Batch{Set: []manifest.Object{benchPod(n, fmt.Sprint(i))}})
				inv.SetEndpoints(endpoints)
				inv.Update(compiler)
				compiler.Compile()
			}
		})
	}
}
