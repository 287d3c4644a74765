// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"fmt"
	"hash/maphash"

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

	// Under the source's lock: what was delivered, what of some objects was not
	// understood, and whether all are there.
	items  map[objectName]item
	pods   map[objectName]uint64 // digests
	faults map[manifest.Key]string
	synced bool

	// Only the reflector translates, one object after the other.
	templates templates
	seed      maphash.Seed
	blank     metav1.ObjectMeta
}

// item is what is known of an object that was delivered: what events name it by,
// and whether the next one differs. Of pods, of which there may be hundreds of
// thousands, those of this node are here for their UID alone.
type item struct {
	digest uint64
	uid    types.UID
}

// objectName is the key of an object among those of a resource.
type objectName struct{ namespace, name string }

func nameOf(key manifest.Key) objectName { return objectName{key.Namespace, key.Name} }

// translated is an object on its way through a reflector, which wants to know the
// object's name and nothing else. At first it has all of them at once.
type translated struct {
	metav1.Object // empty, and shared
	object        manifest.Object
	uid           types.UID
	fault         string
	key           manifest.Key
	// relevant is false for objects that policy needs nothing of.
	relevant bool
}

// GetNamespace is that of the object.
func (t *translated) GetNamespace() string { return t.key.Namespace }

// GetName is that of the object.
func (t *translated) GetName() string { return t.key.Name }

var _ cache.TransformingStore = (*follower)(nil)

func (s *Source) follow(r resource) (*follower, error) {
	lw, err := s.clients.listWatch(&r)
	if err != nil {
		return nil, err
	}
	f := &follower{
		resource: r, source: s, items: make(map[objectName]item), pods: make(map[objectName]uint64), faults: make(map[manifest.Key]string),
		templates: make(templates), seed: maphash.MakeSeed(),
	}
	f.contact = &contact{ListerWatcherWithContext: lw, changed: s.notify}
	return f, nil
}

func (r *resource) key(name metav1.Object) manifest.Key {
	return r.keyOf(objectName{name.GetNamespace(), name.GetName()})
}

func (r *resource) keyOf(name objectName) manifest.Key {
	return manifest.Key{Kind: r.kind, Namespace: name.namespace, Name: name.name}
}

// knows tells whether a cluster-wide object is there. Runs under the source's
// lock.
func (f *follower) knows(name string) bool {
	_, ok := f.items[objectName{name: name}]
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
	there := make(map[objectName]struct{}, len(all))
	for _, t := range all {
		there[nameOf(t.key)] = struct{}{}
		f.set(t)
	}
	for name := range f.items {
		if _, ok := there[name]; !ok {
			f.remove(f.keyOf(name))
		}
	}
	for name := range f.pods {
		if _, ok := there[name]; !ok {
			f.remove(f.keyOf(name))
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
	name, digest := nameOf(t.key), f.digest(t)
	if t.object.Pod != nil {
		if old, ok := f.pods[name]; ok && old == digest {
			return
		}
		// The key in the map shares the memory of the object that is delivered.
		delete(f.pods, name)
		f.pods[name] = digest
		if delete(f.items, name); t.object.Node == f.source.opts.Node {
			f.items[name] = item{uid: t.uid}
		}
	} else {
		now := item{digest, t.uid}
		if old, ok := f.items[name]; ok && old == now {
			return
		}
		delete(f.items, name)
		f.items[name] = now
	}
	if delete(f.faults, t.key); t.fault != "" {
		f.faults[t.key] = t.fault
	}
	f.touch(t.key, &t.object)
}

func (f *follower) remove(key manifest.Key) {
	name := nameOf(key)
	_, isPod := f.pods[name]
	if _, ok := f.items[name]; !ok && !isPod {
		return
	}
	delete(f.items, name)
	delete(f.pods, name)
	delete(f.faults, key)
	f.touch(key, nil)
}

// touch has an object delivered; nil is gone.
func (f *follower) touch(key manifest.Key, o *manifest.Object) {
	f.source.touched[key] = o
	f.source.notify()
}
