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
	// asked are the objects that ask for a key, wants the key each asks for.
	asked map[policy.PodKey]map[manifest.Key]struct{}
	wants map[manifest.Key]policy.PodKey
	// objects by the key they have got, and the other way round.
	objects map[policy.PodKey]manifest.Key
	keys    map[manifest.Key]policy.PodKey
}

func newIdentities() identities {
	return identities{
		asked:   make(map[policy.PodKey]map[manifest.Key]struct{}),
		wants:   make(map[manifest.Key]policy.PodKey),
		objects: make(map[policy.PodKey]manifest.Key),
		keys:    make(map[manifest.Key]policy.PodKey),
	}
}

// identify brings the identities up to date and answers the keys whose pod may
// differ.
func (i *Inventory) identify() (dirty map[policy.PodKey]struct{}) {
	ids := &i.identities
	affected := make(map[manifest.Key]struct{})
	for key := range i.changed {
		if key.Kind != manifest.KindPod {
			continue
		}
		affected[key] = struct{}{}
		if want, ok := ids.wants[key]; ok {
			delete(ids.asked[want], key)
			maps.Copy(affected, ids.asked[want])
			if len(ids.asked[want]) == 0 {
				delete(ids.asked, want)
			}
			delete(ids.wants, key)
		}
		if o, ok := i.objects[key]; ok {
			want := o.Pod.Key
			if ids.asked[want] == nil {
				ids.asked[want] = make(map[manifest.Key]struct{}, 1)
			}
			ids.asked[want][key] = struct{}{}
			ids.wants[key] = want
			maps.Copy(affected, ids.asked[want])
		}
	}
	dirty = make(map[policy.PodKey]struct{}, len(affected))
	for key := range affected {
		if had, ok := ids.keys[key]; ok {
			dirty[had] = struct{}{}
			delete(ids.keys, key)
			delete(ids.objects, had)
		}
	}
	for key := range affected {
		o, ok := i.objects[key]
		if !ok {
			continue
		}
		gets := o.Pod.Key
		if o.Mirror && len(ids.asked[gets]) > 1 {
			gets = manifest.PodKey("", o.Pod.Namespace, o.Pod.Name)
		}
		ids.keys[key], ids.objects[gets] = gets, key
		dirty[gets] = struct{}{}
	}
	return dirty
}

// object is the pod object that goes by a key.
func (i *Inventory) object(key policy.PodKey) (manifest.Object, bool) {
	name, ok := i.identities.objects[key]
	if !ok {
		return manifest.Object{}, false
	}
	o := i.objects[name]
	if o.Pod.Key != key {
		pod := *o.Pod
		pod.Key, pod.UID = key, ""
		o.Pod = &pod
	}
	return o, true
}

// attach finds the pod of each endpoint, and adds those that have or had one to
// the dirty ones.
func (i *Inventory) attach(dirty map[policy.PodKey]struct{}) {
	for key := range i.attached {
		dirty[key] = struct{}{}
	}
	i.attached = make(map[policy.PodKey][]pinning.Endpoint, len(i.endpoints))
	i.bindings = make(map[pinning.AttachmentKey]policy.PodKey, len(i.endpoints))
	for e := range i.endpoints {
		ep := &i.endpoints[e]
		if key, ok := i.find(ep); ok {
			i.attached[key] = append(i.attached[key], *ep)
			i.bindings[ep.Key] = key
			dirty[key] = struct{}{}
		}
	}
}

// find answers the pod of an endpoint: that of its UID, or else of its name.
func (i *Inventory) find(ep *pinning.Endpoint) (policy.PodKey, bool) {
	if ep.PodUID != "" {
		o, ok := i.object(policy.PodKey(ep.PodUID))
		if ok && (i.opts.Unlisted || ep.PodName == "" || o.Pod.Name == ep.PodName && o.Pod.Namespace == namespaceOf(ep)) {
			return o.Pod.Key, true
		}
	}
	if key, ok := i.identities.keys[manifest.Key{Kind: manifest.KindPod, Namespace: namespaceOf(ep), Name: ep.PodName}]; ok {
		if o, _ := i.object(key); i.opts.Unlisted || o.Pod.UID == "" || ep.PodUID == "" {
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
