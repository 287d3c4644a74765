// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package inventory

import (
	"cmp"
	"maps"

	corev1 "k8s.io/api/core/v1"

	"github.com/podgate/podgate/bpf/policy"
	"github.com/podgate/podgate/pinning"
	"github.com/podgate/podgate/syncd/manifest"
)

// identities say which pod object goes by which key.
//
// That is the UID it has, but for the copies of static pods whose UID some
// other pod has as well. A copy names it in an annotation, which whoever creates
// a pod can write: it must not make one pod pass for another. Such a copy goes
// by its name, and is found when it is attached.
type identities struct {
	// alone are the objects that are the only ones to ask for a key, rivals
	// those that are not.
	alone  map[policy.PodKey]*record
	rivals map[policy.PodKey]map[podName]struct{}
	// others are the objects that have got a key that they are not the only ones
	// to ask for.
	others map[policy.PodKey]*record
	// renamed have got another key than they asked for.
	renamed map[podName]policy.PodKey
}

func newIdentities() identities {
	return identities{
		alone:   make(map[policy.PodKey]*record),
		rivals:  make(map[policy.PodKey]map[podName]struct{}),
		others:  make(map[policy.PodKey]*record),
		renamed: make(map[podName]policy.PodKey),
	}
}

// ask notes that an object asks for its key.
func (ids *identities) ask(o *record) {
	want := o.Key
	first := ids.alone[want]
	switch {
	case ids.rivals[want] != nil:
		ids.rivals[want][o.name()] = struct{}{}
	case first != nil && first.name() != o.name():
		ids.rivals[want] = map[podName]struct{}{first.name(): {}, o.name(): {}}
		delete(ids.alone, want)
	default:
		ids.alone[want] = o
	}
}

// withdraw notes that an object does not ask for a key any more. The one that
// is left may have changed as well, and be noted later.
func (i *Inventory) withdraw(want policy.PodKey, name podName) {
	ids := &i.identities
	if first := ids.alone[want]; first != nil && first.name() == name {
		delete(ids.alone, want)
		return
	}
	rivals := ids.rivals[want]
	delete(rivals, name)
	if len(rivals) != 1 {
		return
	}
	delete(ids.rivals, want)
	for last := range rivals {
		if o := cmp.Or(i.relisted[last], i.listed[last]); o != nil {
			ids.alone[want] = o
		}
	}
}

// asking adds the objects that ask for a key.
func (ids *identities) asking(want policy.PodKey, to map[podName]struct{}) {
	maps.Copy(to, ids.rivals[want])
	if first := ids.alone[want]; first != nil {
		to[first.name()] = struct{}{}
	}
}

// got is the key that an object has got.
func (ids *identities) got(o *record) policy.PodKey {
	if renamed, ok := ids.renamed[o.name()]; ok {
		return renamed
	}
	return o.Key
}

// identify brings the identities up to date and answers the names whose object
// may go by another key, and the keys whose pod may differ.
func (i *Inventory) identify() (affected map[podName]struct{}, dirty map[policy.PodKey]struct{}) {
	ids := &i.identities
	affected = make(map[podName]struct{})
	for name, was := range i.relisted {
		affected[name] = struct{}{}
		if was != nil {
			i.withdraw(was.Key, name)
			ids.asking(was.Key, affected)
		}
		if o := i.listed[name]; o != nil {
			ids.ask(o)
			ids.asking(o.Key, affected)
		}
	}
	dirty = make(map[policy.PodKey]struct{}, len(affected))
	for name := range affected {
		was, changed := i.relisted[name]
		if !changed {
			was = i.listed[name]
		}
		if was == nil {
			continue
		}
		had := ids.got(was)
		dirty[had] = struct{}{}
		delete(ids.renamed, name)
		if ids.others[had] == was {
			delete(ids.others, had)
		}
	}
	for name := range affected {
		o := i.listed[name]
		if o == nil {
			continue
		}
		gets := o.Key
		if o.mirror && len(ids.rivals[gets]) > 1 {
			gets = manifest.PodKey("", o.Namespace, o.Name)
			ids.renamed[name] = gets
		}
		if ids.alone[gets] != o {
			ids.others[gets] = o
		}
		dirty[gets] = struct{}{}
	}
	return affected, dirty
}

// object is the pod object that goes by a key; nil if there is none.
func (i *Inventory) object(key policy.PodKey) *record {
	o := cmp.Or(i.identities.others[key], i.identities.alone[key])
	if o == nil {
		return nil
	}
	if o.Key != key {
		renamed, pod := *o, *o.Pod
		pod.Key, pod.UID = key, ""
		renamed.Pod = &pod
		o = &renamed
	}
	return o
}

// attach finds the pod of each endpoint, if it may be another one than before, and
// adds those that have or had an endpoint to the dirty ones.
func (i *Inventory) attach(affected map[podName]struct{}, dirty map[policy.PodKey]struct{}) {
	if i.bound && disjoint(affected, i.named) && disjoint(dirty, i.keyed) {
		return
	}
	for key := range i.attached {
		dirty[key] = struct{}{}
	}
	i.bound = true
	i.named, i.keyed = make(map[podName]struct{}, len(i.endpoints)), make(map[policy.PodKey]struct{}, len(i.endpoints))
	i.attached = make(map[policy.PodKey][]pinning.Endpoint, len(i.endpoints))
	i.bindings = make(map[pinning.AttachmentKey]policy.PodKey, len(i.endpoints))
	for e := range i.endpoints {
		ep := &i.endpoints[e]
		if key, ok := i.find(ep); ok {
			i.attached[key] = append(i.attached[key], *ep)
			i.bindings[ep.Key] = key
			i.keyed[key] = struct{}{}
			dirty[key] = struct{}{}
		}
	}
}

func disjoint[K comparable](few, many map[K]struct{}) bool {
	for k := range few {
		if _, both := many[k]; both {
			return false
		}
	}
	return true
}

// find answers the pod of an endpoint: that of its UID, or else of its name. It
// notes what its answer depends on.
func (i *Inventory) find(ep *pinning.Endpoint) (policy.PodKey, bool) {
	if ep.PodUID != "" {
		i.keyed[policy.PodKey(ep.PodUID)] = struct{}{}
		o := i.object(policy.PodKey(ep.PodUID))
		if o != nil && (i.opts.Unlisted || ep.PodName == "" || o.Name == ep.PodName && o.Namespace == namespaceOf(ep)) {
			return o.Key, true
		}
	}
	name := podName{namespaceOf(ep), ep.PodName}
	i.named[name] = struct{}{}
	if named := i.listed[name]; named != nil {
		key := i.identities.got(named)
		i.keyed[key] = struct{}{}
		if o := i.object(key); o != nil && (i.opts.Unlisted || o.UID == "" || ep.PodUID == "") {
			return key, true
		}
	}
	return manifest.PodKey(ep.PodUID, namespaceOf(ep), nameOf(ep)), i.opts.Unlisted
}

func namespaceOf(ep *pinning.Endpoint) string {
	return cmp.Or(ep.PodNamespace, corev1.NamespaceDefault)
}

// nameOf is the container ID where the runtime knows no pods.
func nameOf(ep *pinning.Endpoint) string { return cmp.Or(ep.PodName, ep.Key.ContainerID) }
