// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"encoding/json"
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

// digest is equal for objects that nobody could tell apart.
func (f *follower) digest(t *translated) uint64 {
	var h maphash.Hash
	h.SetSeed(f.seed)
	rest := t.object
	rest.Policy, rest.Pod, rest.Namespace, rest.Service, rest.EndpointSlice = nil, nil, nil, nil, nil
	// It writes to memory, which does not fail, and there is nothing that has no
	// JSON. Pods, of which there are most, have no pointers in them.
	_, _ = fmt.Fprintf(&h, "%#v %q", rest, t.fault)
	if t.object.Pod != nil {
		_, _ = fmt.Fprintf(&h, "%#v", *t.object.Pod)
	}
	_ = json.NewEncoder(&h).Encode([]any{t.object.Policy, t.object.Namespace, t.object.Service, t.object.EndpointSlice})
	return h.Sum64()
}
