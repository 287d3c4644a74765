// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"fmt"
	"hash/maphash"
	"unique"

	"github.com/podgate/podgate/bpf/policy"
	"github.com/podgate/podgate/syncd/manifest"
)

// templates are what the pods of a workload have in common, by what it says: they
// share it instead of each having a copy.
type templates map[string]template

type template struct {
	labels map[string]string
	ports  []policy.NamedPort
}

// mostTemplates is how many are remembered. Pods that have labels of their own each
// make new ones all the time.
const mostTemplates = 1 << 14

// share makes a pod refer to what others have as well.
func (f *follower) share(o *manifest.Object) {
	p := o.Pod
	if p == nil {
		return
	}
	o.Node = unique.Make(o.Node).Value()
	p.Namespace = unique.Make(p.Namespace).Value()
	o.Key = manifest.Key{Kind: f.kind, Namespace: p.Namespace, Name: p.Name}
	if string(p.Key) == p.UID {
		p.Key = policy.PodKey(p.UID)
	}
	says := fmt.Sprintf("%q %#v", p.Labels, p.Ports)
	m, ok := f.templates[says]
	if !ok {
		m = template{make(map[string]string, len(p.Labels)), p.Ports}
		for k, v := range p.Labels {
			m.labels[unique.Make(k).Value()] = unique.Make(v).Value()
		}
		if len(f.templates) == mostTemplates {
			clear(f.templates)
		}
		f.templates[says] = m
	}
	p.Labels, p.Ports = m.labels, m.ports
}

// digest is equal for pods that nobody could tell apart.
func (f *follower) digest(t *translated) uint64 {
	var h maphash.Hash
	h.SetSeed(f.seed)
	rest := t.object
	rest.Pod = nil
	// It writes to memory, which does not fail.
	_, _ = fmt.Fprintf(&h, "%#v %#v %q", rest, *t.object.Pod, t.fault)
	return h.Sum64()
}
