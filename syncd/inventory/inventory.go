// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

// Package inventory joins what a source says with what is attached to the node:
// objects and endpoints become the policies, pods and namespaces that the
// compiler takes.
package inventory

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"

	"github.com/podgate/podgate/bpf/policy"
	"github.com/podgate/podgate/pinning"
	"github.com/podgate/podgate/syncd/manifest"
	"github.com/podgate/podgate/syncd/source"
)

// Options of an [Inventory].
type Options struct {
	// Node is this node's name, as in spec.nodeName.
	Node string
	// Unlisted says that an endpoint may belong to a pod that no object
	// describes: it is then a pod with the namespace and the labels that the
	// runtime gave ADD. Otherwise an endpoint waits for its object. It also
	// lets an object stand for a pod of its name with another UID, which is as
	// good as a file written by hand can know.
	Unlisted bool
	// AuditPods honours [manifest.AnnotationAudit] on Pods. Without it only that
	// on Namespaces counts: who may create a pod may not thereby switch off what
	// is enforced on it.
	AuditPods bool
	// AllLocal gives rulesets to all pods wherever they run, for questions
	// about them.
	AllLocal bool
}

// Inventory is the state of one node. It is not safe for concurrent use.
type Inventory struct {
	opts      Options
	objects   map[manifest.Key]manifest.Object
	endpoints []pinning.Endpoint

	// What the compiler has, as of the last Update.
	policies   map[string]*policy.Policy
	namespaces map[string]policy.Namespace
	pods       map[policy.PodKey]policy.Pod
	bindings   map[pinning.AttachmentKey]policy.PodKey
	// refused are the policies and pods the compiler did not take.
	refused map[manifest.Key]error
}

// New is an empty inventory.
func New(opts Options) *Inventory {
	return &Inventory{
		opts:       opts,
		objects:    make(map[manifest.Key]manifest.Object),
		policies:   make(map[string]*policy.Policy),
		namespaces: make(map[string]policy.Namespace),
		pods:       make(map[policy.PodKey]policy.Pod),
		bindings:   make(map[pinning.AttachmentKey]policy.PodKey),
		refused:    make(map[manifest.Key]error),
	}
}

// Apply takes a batch of a source.
func (i *Inventory) Apply(b source.Batch) {
	for _, k := range b.Gone {
		delete(i.objects, k)
	}
	for _, o := range b.Set {
		if o.Policy != nil || o.Pod != nil || o.Namespace != nil {
			i.objects[o.Key] = o
		}
	}
}

// SetEndpoints replaces the endpoints of the node.
func (i *Inventory) SetEndpoints(endpoints []pinning.Endpoint) {
	i.endpoints = slices.SortedFunc(slices.Values(endpoints), func(a, b pinning.Endpoint) int { return cmp.Compare(a.ID, b.ID) })
}

// Update brings a compiler up to date; it must be the same one each time. What
// the compiler refuses stays as it was there and is among the problems, which
// carry no dates.
func (i *Inventory) Update(c *policy.Compiler) []source.Problem {
	next := i.derive()
	for name, ns := range next.namespaces {
		if old, ok := i.namespaces[name]; !ok || !maps.Equal(old.Labels, ns.Labels) {
			c.SetNamespace(ns)
		}
	}
	for uid, p := range next.policies {
		if i.policies[uid] != p {
			i.note(policyKey(p), c.SetPolicy(*p))
		}
	}
	for uid, p := range i.policies {
		if _, ok := next.policies[uid]; !ok {
			c.DeletePolicy(uid)
			delete(i.refused, policyKey(p))
		}
	}
	for key, pod := range i.pods {
		if _, ok := next.pods[key]; !ok {
			c.DeletePod(key)
			delete(i.refused, objectKey(&pod))
		}
	}
	for key, pod := range next.pods {
		if old, ok := i.pods[key]; !ok || !samePod(old, pod) {
			i.note(objectKey(&pod), c.SetPod(pod))
		}
	}
	for name := range i.namespaces {
		if _, ok := next.namespaces[name]; !ok {
			c.DeleteNamespace(name)
		}
	}
	i.policies, i.namespaces, i.pods, i.bindings = next.policies, next.namespaces, next.pods, next.bindings

	problems := next.problems
	for _, key := range slices.SortedFunc(maps.Keys(i.refused), manifest.Key.Compare) {
		problems = append(problems, source.Problem{Subject: key.String(), Object: key, Reason: i.refused[key].Error()})
	}
	return problems
}

func (i *Inventory) note(key manifest.Key, err error) {
	if err != nil {
		i.refused[key] = err
	} else {
		delete(i.refused, key)
	}
}

func policyKey(p *policy.Policy) manifest.Key {
	return manifest.Key{Kind: p.Kind, Namespace: p.Namespace, Name: p.Name}
}

func objectKey(p *policy.Pod) manifest.Key {
	return manifest.Key{Kind: manifest.KindPod, Namespace: p.Namespace, Name: p.Name}
}

func samePod(a, b policy.Pod) bool {
	return a.UID == b.UID && a.Namespace == b.Namespace && a.Name == b.Name &&
		maps.Equal(a.Labels, b.Labels) && slices.Equal(a.Addresses, b.Addresses) && slices.Equal(a.Ports, b.Ports) &&
		a.HostNetwork == b.HostNetwork && a.Terminating == b.Terminating && a.Local == b.Local && a.Audit == b.Audit
}

// Bindings answers the pod of each endpoint, as of the last Update. An endpoint
// whose pod is not known yet is missing.
func (i *Inventory) Bindings() map[pinning.AttachmentKey]policy.PodKey { return maps.Clone(i.bindings) }

// Pods answers all pods as of the last Update, by namespace and name.
func (i *Inventory) Pods() []policy.Pod {
	return slices.SortedFunc(maps.Values(i.pods), func(a, b policy.Pod) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name), cmp.Compare(a.Key, b.Key))
	})
}

// Counts answers how many policies, pods and namespaces the compiler has.
func (i *Inventory) Counts() (policies, pods, namespaces int) {
	return len(i.policies), len(i.pods), len(i.namespaces)
}

// routable answers the addresses of endpoints that name a pod to others;
// link-local ones do not, two pods may have the same.
func routable(endpoints []pinning.Endpoint) (out []netip.Addr) {
	for _, ep := range endpoints {
		for _, a := range ep.Addresses {
			if a = a.Unmap(); !a.IsLinkLocalUnicast() && !slices.Contains(out, a) {
				out = append(out, a)
			}
		}
	}
	return out
}
