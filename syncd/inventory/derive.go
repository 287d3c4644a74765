// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package inventory

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/podgate/podgate/bpf/policy"
	"github.com/podgate/podgate/pinning"
	"github.com/podgate/podgate/syncd/manifest"
	"github.com/podgate/podgate/syncd/source"
)

// derived is what objects and endpoints amount to.
type derived struct {
	policies   map[string]*policy.Policy
	namespaces map[string]policy.Namespace
	pods       map[policy.PodKey]policy.Pod
	bindings   map[pinning.AttachmentKey]policy.PodKey
	problems   []source.Problem
}

func (i *Inventory) derive() *derived {
	d := &derived{
		policies:   make(map[string]*policy.Policy),
		namespaces: make(map[string]policy.Namespace),
		pods:       make(map[policy.PodKey]policy.Pod),
		bindings:   make(map[pinning.AttachmentKey]policy.PodKey),
	}
	audited := make(map[string]bool)
	var objects []manifest.Object // of pods
	for _, o := range i.objects {
		switch {
		case o.Policy != nil:
			d.policies[o.Policy.UID] = o.Policy
		case o.Namespace != nil:
			d.namespaces[o.Name] = *o.Namespace
			audited[o.Name] = o.Audit
		case o.Pod != nil:
			objects = append(objects, o)
		}
	}
	unmirror(objects)

	attached := i.bind(d, objects)
	for _, o := range objects {
		pod := *o.Pod
		mine := attached[pod.Key]
		pod.Local = len(mine) > 0 || i.opts.AllLocal || i.expected(o)
		if len(mine) > 0 {
			// The node knows better than a status that may be old.
			pod.Addresses = routable(mine)
		}
		d.pods[pod.Key] = pod
	}
	for key, endpoints := range attached {
		if _, listed := d.pods[key]; !listed {
			d.pods[key] = unlisted(key, endpoints)
		}
	}
	for _, key := range slices.Sorted(maps.Keys(d.pods)) {
		pod := d.pods[key]
		if pod.Local && pod.Audit && !i.opts.AuditPods && !audited[pod.Namespace] {
			d.problems = append(d.problems, source.Problem{
				Subject: objectKey(&pod).String(), Object: objectKey(&pod),
				Reason: "annotation " + manifest.AnnotationAudit + " has no effect on a Pod without --audit-pods, only on its Namespace",
			})
		}
		pod.Audit = pod.Audit && i.opts.AuditPods || audited[pod.Namespace]
		d.pods[key] = pod
		if _, ok := d.namespaces[pod.Namespace]; !ok {
			d.namespaces[pod.Namespace] = manifest.NamespaceOf(pod.Namespace, nil)
		}
	}
	d.settleAddresses(attached, objects)
	return d
}

// unmirror takes the UID from the copies of static pods whose UID some other
// pod has as well. A copy names it in an annotation, which whoever creates a
// pod can write: it must not make one pod pass for another. Without a UID a pod
// is found by its name, when it is attached.
func unmirror(objects []manifest.Object) {
	claims := make(map[policy.PodKey]int)
	for _, o := range objects {
		claims[o.Pod.Key]++
	}
	for i, o := range objects {
		if o.Mirror && claims[o.Pod.Key] > 1 {
			pod := *o.Pod
			pod.UID, pod.Key = "", manifest.PodKey("", pod.Namespace, pod.Name)
			objects[i].Pod = &pod
		}
	}
}

// expected says that a pod without an endpoint may get one here, so that its
// rulesets must be there before.
func (i *Inventory) expected(o manifest.Object) bool {
	if o.Node != "" || !i.opts.Unlisted {
		return o.Node == i.opts.Node
	}
	return len(o.Pod.Addresses) == 0
}

// bind finds the pod of each endpoint and answers each pod's endpoints.
func (i *Inventory) bind(d *derived, objects []manifest.Object) map[policy.PodKey][]pinning.Endpoint {
	byUID := make(map[string]*policy.Pod)
	byName := make(map[[2]string]*policy.Pod)
	for _, o := range objects {
		if o.Pod.UID != "" {
			byUID[o.Pod.UID] = o.Pod
		}
		byName[[2]string{o.Pod.Namespace, o.Pod.Name}] = o.Pod
	}
	find := func(ep *pinning.Endpoint) (policy.PodKey, bool) {
		if pod, ok := byUID[ep.PodUID]; ok && (i.opts.Unlisted || ep.PodName == "" || pod.Name == ep.PodName && pod.Namespace == namespaceOf(ep)) {
			return pod.Key, true
		}
		pod, ok := byName[[2]string{namespaceOf(ep), ep.PodName}]
		if ok && (i.opts.Unlisted || pod.UID == "" || ep.PodUID == "") {
			return pod.Key, true
		}
		return manifest.PodKey(ep.PodUID, namespaceOf(ep), nameOf(ep)), i.opts.Unlisted
	}
	attached := make(map[policy.PodKey][]pinning.Endpoint)
	for e := range i.endpoints {
		ep := &i.endpoints[e]
		if key, ok := find(ep); ok {
			attached[key] = append(attached[key], *ep)
			d.bindings[ep.Key] = key
		}
	}
	return attached
}

// unlisted is the pod that endpoints belong to and no object describes.
func unlisted(key policy.PodKey, endpoints []pinning.Endpoint) policy.Pod {
	first := &endpoints[0]
	return policy.Pod{
		Key:       key,
		UID:       first.PodUID,
		Namespace: namespaceOf(first),
		Name:      nameOf(first),
		Labels:    maps.Clone(first.Labels),
		Addresses: routable(endpoints),
		Local:     true,
	}
}

func namespaceOf(ep *pinning.Endpoint) string {
	return cmp.Or(ep.PodNamespace, corev1.NamespaceDefault)
}

// nameOf is the container ID where the runtime knows no pods.
func nameOf(ep *pinning.Endpoint) string { return cmp.Or(ep.PodName, ep.Key.ContainerID) }

// settleAddresses leaves each address to one pod where it can tell whose it is.
// Of local pods the one attached last has it, and a status elsewhere that still
// names it is only old. Of pods elsewhere the youngest has it, of those that
// are not terminating; where it is not said when they were made, the compiler
// chooses.
func (d *derived) settleAddresses(attached map[policy.PodKey][]pinning.Endpoint, objects []manifest.Object) {
	claims := make(map[netip.Addr]policy.PodKey, len(d.pods))
	contested := make(map[netip.Addr][]policy.PodKey)
	for key, pod := range d.pods {
		if pod.HostNetwork {
			continue
		}
		for _, a := range pod.Addresses {
			if first, taken := claims[a]; !taken {
				claims[a] = key
			} else if contested[a] == nil {
				contested[a] = []policy.PodKey{first, key}
			} else {
				contested[a] = append(contested[a], key)
			}
		}
	}
	if len(contested) == 0 {
		return
	}
	created := make(map[policy.PodKey]time.Time, len(objects))
	for _, o := range objects {
		created[o.Pod.Key] = o.Created
	}
	latest := func(key policy.PodKey) uint32 {
		if eps := attached[key]; len(eps) > 0 {
			return eps[len(eps)-1].ID
		}
		return 0
	}
	for _, a := range slices.SortedFunc(maps.Keys(contested), netip.Addr.Compare) {
		rivals := contested[a]
		slices.SortFunc(rivals, func(x, y policy.PodKey) int {
			p, q := d.pods[x], d.pods[y]
			return cmp.Or(cmp.Compare(latest(y), latest(x)), compareBool(p.Terminating, q.Terminating), created[y].Compare(created[x]),
				cmp.Compare(p.Namespace, q.Namespace), cmp.Compare(p.Name, q.Name), cmp.Compare(x, y))
		})
		first := d.pods[rivals[0]]
		local := latest(rivals[0]) > 0
		for _, key := range rivals[1:] {
			pod := d.pods[key]
			if local == (latest(key) > 0) && !pod.Terminating && !first.Terminating {
				d.problems = append(d.problems, source.Problem{
					Subject: objectKey(&pod).String(), Object: objectKey(&pod),
					Reason: fmt.Sprintf("its address %v is also that of %v", a, objectKey(&first)),
				})
			}
			if local || !created[key].IsZero() {
				pod.Addresses = slices.DeleteFunc(slices.Clone(pod.Addresses), func(b netip.Addr) bool { return a == b })
				d.pods[key] = pod
			}
		}
	}
}

// compareBool orders false before true.
func compareBool(a, b bool) int {
	switch {
	case a == b:
		return 0
	case b:
		return -1
	}
	return 1
}
