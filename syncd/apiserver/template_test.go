// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package apiserver

import (
	"hash/maphash"
	"maps"
	"net/netip"
	"reflect"
	"testing"
	"time"

	"github.com/podgate/podgate/bpf/policy"
	"github.com/podgate/podgate/syncd/manifest"
)

// TestDigest asks that no field of a pod can change without its digest, those
// that somebody adds later included.
func TestDigest(t *testing.T) {
	f := &follower{seed: maphash.MakeSeed(), templates: make(templates)}
	pod := func() *translated {
		return &translated{object: manifest.Object{Pod: &policy.Pod{
			Labels: map[string]string{"a": "b", "c": "d"}, Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.1")},
			Ports: []policy.NamedPort{{Name: "http", Protocol: policy.TCP, Port: 80}},
		}}}
	}
	same := f.digest(pod())
	if f.digest(pod()) != same {
		t.Error("the digest of equal pods differs")
	}
	differs := func(what string, change func(*translated)) {
		p := pod()
		change(p)
		if f.digest(p) == same {
			t.Errorf("the digest does not tell %s", what)
		}
	}
	differs("a fault", func(p *translated) { p.fault = "x" })
	differs("where labels end", func(p *translated) { p.object.Pod.Labels = map[string]string{"a": `b" "c":"d`} })
	each := func(at func(*translated) reflect.Value) {
		kind := at(pod()).Type()
		for i := range kind.NumField() {
			differs(kind.String()+"."+kind.Field(i).Name, func(p *translated) {
				switch v := at(p).Field(i).Addr().Interface().(type) {
				case *string:
					*v = "x"
				case *policy.PodKey:
					*v = "x"
				case *bool:
					*v = true
				case *int:
					*v = 1
				case *time.Time:
					*v = time.Unix(1, 0)
				case *manifest.Workload:
					v.Name = "x"
				case *manifest.Key:
					v.Name = "x"
				case *map[string]string:
					*v = map[string]string{"a": "b", "c": "e"}
				case *[]netip.Addr:
					*v = []netip.Addr{netip.MustParseAddr("10.0.0.2")}
				case *[]policy.NamedPort:
					*v = []policy.NamedPort{{Name: "http", Protocol: policy.TCP, Port: 81}}
				case **policy.Policy:
					*v = &policy.Policy{}
				case **policy.Pod:
					*v = &policy.Pod{}
				case **policy.Namespace:
					*v = &policy.Namespace{}
				case **manifest.Service:
					*v = &manifest.Service{}
				case **manifest.EndpointSlice:
					*v = &manifest.EndpointSlice{}
				default:
					t.Errorf("%s has a field of type %T", kind, v)
				}
			})
		}
	}
	each(func(p *translated) reflect.Value { return reflect.ValueOf(&p.object).Elem() })
	each(func(p *translated) reflect.Value { return reflect.ValueOf(p.object.Pod).Elem() })
}

// TestShare asks that pods which say the same share it, and that no other does.
func TestShare(t *testing.T) {
	f := &follower{resource: resource{kind: manifest.KindPod}, templates: make(templates)}
	pod := func(labels map[string]string, ports ...policy.NamedPort) *policy.Pod {
		p := &policy.Pod{Key: "u", UID: "u", Namespace: "n", Name: "p", Labels: maps.Clone(labels), Ports: ports}
		o := manifest.Object{Key: manifest.Key{Kind: manifest.KindPod, Namespace: "n", Name: "p"}, Pod: p}
		f.share(&o)
		if !maps.Equal(p.Labels, labels) || o.Key != (manifest.Key{Kind: manifest.KindPod, Namespace: "n", Name: "p"}) {
			t.Errorf("%+v is not what was shared: %+v", o, p)
		}
		return p
	}
	one, http := map[string]string{"a": "1"}, policy.NamedPort{Name: "http", Protocol: policy.TCP, Port: 80}
	same := func(a, b *policy.Pod) bool {
		return reflect.ValueOf(a.Labels).UnsafePointer() == reflect.ValueOf(b.Labels).UnsafePointer()
	}
	if !same(pod(one, http), pod(one, http)) {
		t.Error("what is the same is not shared")
	}
	for _, other := range []*policy.Pod{pod(one), pod(map[string]string{"a": "2"}, http), pod(map[string]string{"a": `1" "b":"2`}, http)} {
		if same(pod(one, http), other) {
			t.Errorf("%+v shares", other)
		}
	}
}
