// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"fmt"
	"reflect"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/cache"

	"github.com/podgate/podgate/syncd/manifest"
)

// follower is what a reflector keeps equal to the server: the objects of one
// resource, translated. What a translation leaves out is never kept.
type follower struct {
	resource
	*contact
	source *Source

	// Under the source's lock: the objects, those with a fault, and whether all
	// are there.
	items  map[manifest.Key]item
	faulty map[manifest.Key]struct{}
	synced bool
}

// item is what is left of an object.
type item struct {
	object manifest.Object
	uid    types.UID
	// fault says what of the object was not understood.
	fault string
}

// translated is an item on its way through a reflector, which wants to know the
// object's name.
type translated struct {
	metav1.ObjectMeta
	item
	key manifest.Key
	// relevant is false for objects that policy needs nothing of.
	relevant bool
}

var _ cache.TransformingStore = (*follower)(nil)

func (s *Source) follow(r resource) (*follower, error) {
	lw, err := s.clients.listWatch(&r)
	if err != nil {
		return nil, err
	}
	f := &follower{resource: r, source: s, items: make(map[manifest.Key]item), faulty: make(map[manifest.Key]struct{})}
	f.contact = &contact{ListerWatcherWithContext: lw, changed: s.notify}
	return f, nil
}

func (r *resource) key(name metav1.Object) manifest.Key {
	return manifest.Key{Kind: r.kind, Namespace: name.GetNamespace(), Name: name.GetName()}
}

// knows tells whether a cluster-wide object is there. Runs under the source's
// lock.
func (f *follower) knows(name string) bool {
	_, ok := f.items[manifest.Key{Kind: f.kind, Name: name}]
	return ok
}

// Transformer makes a reflector translate each object of a stream as it comes.
func (f *follower) Transformer() cache.TransformFunc {
	return func(obj any) (any, error) { return f.translated(obj) }
}

func (f *follower) translated(obj any) (*translated, error) {
	switch obj := obj.(type) {
	case *translated:
		return obj, nil
	case runtime.Object:
		return f.translate(obj)
	}
	return nil, fmt.Errorf("%T is no API object", obj)
}

// Add notes an object that is new to the watch.
func (f *follower) Add(obj any) error { return f.Update(obj) }

// Update notes an object.
func (f *follower) Update(obj any) error {
	t, err := f.translated(obj)
	if err != nil {
		return err
	}
	f.source.mu.Lock()
	defer f.source.mu.Unlock()
	f.set(t)
	return nil
}

// Delete forgets an object.
func (f *follower) Delete(obj any) error {
	name, err := meta.Accessor(obj)
	if err != nil {
		return err
	}
	f.source.mu.Lock()
	defer f.source.mu.Unlock()
	f.remove(f.key(name))
	return nil
}

// Replace notes all objects there are.
func (f *follower) Replace(list []any, _ string) error {
	all := make([]*translated, len(list))
	for i, obj := range list {
		t, err := f.translated(obj)
		if err != nil {
			return err
		}
		all[i] = t
	}
	f.source.mu.Lock()
	defer f.source.mu.Unlock()
	there := make(map[manifest.Key]struct{}, len(all))
	for _, t := range all {
		there[t.key] = struct{}{}
		f.set(t)
	}
	for key := range f.items {
		if _, ok := there[key]; !ok {
			f.remove(key)
		}
	}
	f.synced = true
	f.source.notify()
	return nil
}

// Resync has nothing to do: what was delivered counts.
func (f *follower) Resync() error { return nil }

// set runs under the source's lock.
func (f *follower) set(t *translated) {
	if !t.relevant {
		f.remove(t.key)
		return
	}
	if old, ok := f.items[t.key]; ok && reflect.DeepEqual(old, t.item) {
		return
	}
	f.items[t.key] = t.item
	if delete(f.faulty, t.key); t.fault != "" {
		f.faulty[t.key] = struct{}{}
	}
	f.touch(t.key)
}

// remove runs under the source's lock.
func (f *follower) remove(key manifest.Key) {
	if _, ok := f.items[key]; ok {
		delete(f.items, key)
		delete(f.faulty, key)
		f.touch(key)
	}
}

func (f *follower) touch(key manifest.Key) {
	f.source.touched[key] = struct{}{}
	f.source.notify()
}
