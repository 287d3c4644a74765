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

	"sigs.k8s.io/randfill"

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

// TestDigestDeep asks the same of what a policy, a Service and its endpoints
// have in them, however deep.
func TestDigestDeep(t *testing.T) {
	f := &follower{seed: maphash.MakeSeed(), templates: make(templates)}
	made := func(seed int64) manifest.Object {
		fill := filler(seed).NilChance(0).NumElements(1, 1)
		var o manifest.Object
		fill.Funcs(
			func(a *netip.Addr, c randfill.Continue) { *a = netip.AddrFrom4([4]byte{10, 0, 0, byte(c.Intn(256))}) },
			func(p *netip.Prefix, c randfill.Continue) {
				*p = netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, 0, byte(c.Intn(256))}), 32)
			},
			func(*policy.Pod, randfill.Continue) {},
			func(*time.Time, randfill.Continue) {},
		).Fill(&o)
		return o
	}
	object := made(1)
	same := f.digest(&translated{object: object})
	copied := made(1)
	if f.digest(&translated{object: copied}) != same {
		t.Error("the digest of equal objects differs")
	}
	var leaves int
	for _, v := range []reflect.Value{
		reflect.ValueOf(object.Policy), reflect.ValueOf(object.Namespace), reflect.ValueOf(object.Service), reflect.ValueOf(object.EndpointSlice),
	} {
		eachLeaf(v, v.Type().String(), func(what string, at reflect.Value) {
			leaves++
			old := reflect.New(at.Type()).Elem()
			old.Set(at)
			switch v := at.Addr().Interface().(type) {
			case *netip.Addr:
				*v = v.Next()
			case *netip.Prefix:
				*v = netip.PrefixFrom(v.Addr(), 31)
			default:
				switch at.Kind() {
				case reflect.String:
					at.SetString(at.String() + "x")
				case reflect.Bool:
					at.SetBool(!at.Bool())
				case reflect.Uint8, reflect.Uint16:
					at.SetUint(at.Uint() ^ 1)
				case reflect.Int32:
					at.SetInt(at.Int() ^ 1)
				default:
					t.Fatalf("%s is of type %s", what, at.Type())
				}
			}
			if f.digest(&translated{object: object}) == same {
				t.Errorf("the digest does not tell %s", what)
			}
			at.Set(old)
		})
	}
	if leaves < 30 {
		t.Errorf("%d fields", leaves)
	}
}

// eachLeaf visits what has no parts.
func eachLeaf(v reflect.Value, what string, visit func(string, reflect.Value)) {
	switch v.Type() {
	case reflect.TypeFor[netip.Addr](), reflect.TypeFor[netip.Prefix]():
		visit(what, v)
		return
	}
	switch v.Kind() {
	case reflect.Pointer:
		eachLeaf(v.Elem(), what, visit)
	case reflect.Struct:
		for i := range v.NumField() {
			eachLeaf(v.Field(i), what+"."+v.Type().Field(i).Name, visit)
		}
	case reflect.Slice, reflect.Array:
		for i := range v.Len() {
			eachLeaf(v.Index(i), what+"[]", visit)
		}
	case reflect.Map: // of labels, as a pod has
	default:
		visit(what, v)
	}
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
