// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"fmt"
	"hash/maphash"
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

	// Under the source's lock: what was delivered, what of some objects was not
	// understood, and whether all are there.
	items  map[manifest.Key]item
	pods   map[podName]uint64 // digests
	faults map[manifest.Key]string
	synced bool

	// Only the reflector translates, one object after the other.
	templates templates
	seed      maphash.Seed
	blank     metav1.ObjectMeta
}

// item is an object that was delivered, to tell whether the next one differs.
// Of pods, of which there may be hundreds of thousands, a digest does, but that
// those of this node are here, without their content, so that events can name
// them.
type item struct {
	object *manifest.Object
	uid    types.UID
}

// podName is the key of a pod.
type podName struct{ namespace, name string }

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
		resource: r, source: s, items: make(map[manifest.Key]item), pods: make(map[podName]uint64), faults: make(map[manifest.Key]string),
		templates: make(templates), seed: maphash.MakeSeed(),
	}
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
	for name := range f.pods {
		key := manifest.Key{Kind: f.kind, Namespace: name.namespace, Name: name.name}
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
	fault, faulty := f.faults[t.key]
	if t.object.Pod != nil {
		name, digest := podName{t.key.Namespace, t.key.Name}, f.digest(t)
		if old, ok := f.pods[name]; ok && old == digest {
			return
		}
		// The key in the map shares the memory of the object that is delivered.
		delete(f.pods, name)
		f.pods[name] = digest
		if delete(f.items, t.key); t.object.Node == f.source.opts.Node {
			f.items[t.key] = item{uid: t.uid}
		}
	} else {
		old, ok := f.items[t.key]
		if ok && old.uid == t.uid && fault == t.fault && reflect.DeepEqual(*old.object, t.object) {
			return
		}
		object := t.object // without the rest of t
		f.items[t.key] = item{&object, t.uid}
	}
	if faulty {
		delete(f.faults, t.key)
	}
	if t.fault != "" {
		f.faults[t.key] = t.fault
	}
	f.touch(t.key, &t.object)
}

func (f *follower) remove(key manifest.Key) {
	name := podName{key.Namespace, key.Name}
	_, isPod := f.pods[name]
	if _, ok := f.items[key]; !ok && !isPod {
		return
	}
	delete(f.items, key)
	delete(f.pods, name)
	delete(f.faults, key)
	f.touch(key, nil)
}

// touch has an object delivered; nil is gone.
func (f *follower) touch(key manifest.Key, o *manifest.Object) {
	f.source.touched[key] = o
	f.source.notify()
}
