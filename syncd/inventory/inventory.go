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
//
// An update costs what changed since the one before, and the endpoints if they may
// have.
type Inventory struct {
	opts Options
	// listed are the Pods, objects all others.
	listed  map[podName]*record
	objects map[manifest.Key]*object
	// What has changed since the last Update, and what it was then; nil is
	// nothing.
	relisted  map[podName]*record
	changed   map[manifest.Key]*object
	endpoints []pinning.Endpoint

	// What follows from them, as of the last Update.
	identities identities
	attached   map[policy.PodKey][]pinning.Endpoint
	candidates candidates
	// bound says that attached is what follows from the endpoints, for as long as
	// no Pod and no key changes that they have to do with.
	bound bool
	named map[podName]struct{}
	keyed map[policy.PodKey]struct{}

	// What the compiler has, as of the last Update.
	policies   map[string]*policy.Policy
	origins    map[string]manifest.Key // of the policies
	namespaces map[string]policy.Namespace
	bindings   map[pinning.AttachmentKey]policy.PodKey
	// refused are the policies and pods the compiler did not take.
	refused map[manifest.Key]error
}

// New is an empty inventory.
func New(opts Options) *Inventory {
	return &Inventory{
		opts:       opts,
		listed:     make(map[podName]*record),
		objects:    make(map[manifest.Key]*object),
		relisted:   make(map[podName]*record),
		changed:    make(map[manifest.Key]*object),
		identities: newIdentities(),
		candidates: newCandidates(),
		policies:   make(map[string]*policy.Policy),
		origins:    make(map[string]manifest.Key),
		namespaces: make(map[string]policy.Namespace),
		bindings:   make(map[pinning.AttachmentKey]policy.PodKey),
		refused:    make(map[manifest.Key]error),
	}
}

// object is what there is to know of an object that is no Pod.
type object struct {
	policy    *policy.Policy
	namespace *policy.Namespace
	audit     bool
}

// podName is the key of a Pod.
type podName struct{ namespace, name string }

func (a *record) name() podName { return podName{a.Namespace, a.Name} }

func (i *Inventory) list(o *manifest.Object) *record {
	r := &record{Pod: o.Pod, mirror: o.Mirror, ended: o.Ended}
	switch o.Node {
	case "":
	case i.opts.Node:
		r.where = here
	default:
		r.where = elsewhere
	}
	if !o.Created.IsZero() {
		r.created = o.Created.UnixNano()
	}
	return r
}

// Apply takes a batch of a source. It keeps what the objects refer to.
func (i *Inventory) Apply(b source.Batch) {
	for _, k := range b.Gone {
		name := podName{k.Namespace, k.Name}
		switch {
		case k.Kind == manifest.KindPod && i.listed[name] != nil:
			remember(i.relisted, i.listed, name)
			delete(i.listed, name)
		case i.objects[k] != nil:
			remember(i.changed, i.objects, k)
			delete(i.objects, k)
		}
	}
	for _, o := range b.Set {
		switch {
		case o.Pod != nil:
			l := i.list(&o)
			remember(i.relisted, i.listed, l.name())
			// The key shares the memory of the pod.
			delete(i.listed, l.name())
			i.listed[l.name()] = l
		case o.Policy != nil || o.Namespace != nil:
			remember(i.changed, i.objects, o.Key)
			i.objects[o.Key] = &object{o.Policy, o.Namespace, o.Audit}
		}
	}
}

// remember keeps what was at the last Update.
func remember[K comparable, V any](changed, now map[K]*V, k K) {
	if _, again := changed[k]; !again {
		changed[k] = now[k]
	}
}

// SetEndpoints replaces the endpoints of the node.
func (i *Inventory) SetEndpoints(endpoints []pinning.Endpoint) {
	i.endpoints = slices.SortedFunc(slices.Values(endpoints), func(a, b pinning.Endpoint) int { return cmp.Compare(a.ID, b.ID) })
	i.bound = false
}

// Update brings a compiler up to date; it must be the same one each time. What
// the compiler refuses stays as it was there and is among the problems, which
// carry no dates.
func (i *Inventory) Update(c *policy.Compiler) []source.Problem {
	affected, dirty := i.identify()
	i.attach(affected, dirty)
	namespaces := i.namespacesChanged(dirty)
	proposed := i.propose(c, dirty, namespaces)
	proposed.settle()

	var gone []string
	for name := range namespaces {
		ns, ok := i.namespace(name)
		if !ok {
			gone = append(gone, name)
		} else if old, had := i.namespaces[name]; !had || !maps.Equal(old.Labels, ns.Labels) {
			c.SetNamespace(ns)
			i.namespaces[name] = ns
		}
	}
	i.updatePolicies(c)
	for key, given := range proposed.gone {
		c.DeletePod(key)
		delete(i.refused, objectKey(given))
	}
	for key := range proposed.pods {
		r := i.candidates.pods[key]
		if r == nil {
			continue
		}
		if pod := i.candidates.settled(r); r.given == nil || !samePod(r.given, pod) {
			i.note(objectKey(pod), c.SetPod(*pod))
			r.given = pod
		}
	}
	for _, name := range gone {
		c.DeleteNamespace(name)
		delete(i.namespaces, name)
	}
	// A map that was cleared keeps the room for as many as it ever had.
	i.relisted, i.changed = make(map[podName]*record), make(map[manifest.Key]*object)
	return i.problems()
}

// updatePolicies hands over the policies that changed.
func (i *Inventory) updatePolicies(c *policy.Compiler) {
	for key := range i.changed {
		o, ok := i.objects[key]
		if !ok || o.policy == nil {
			continue
		}
		if p := o.policy; i.policies[p.UID] != p {
			i.note(key, c.SetPolicy(*p))
			i.policies[p.UID] = p
			i.origins[p.UID] = key
		}
	}
	for key, was := range i.changed {
		if was == nil || was.policy == nil || i.origins[was.policy.UID] != key {
			continue
		}
		uid := was.policy.UID
		o, ok := i.objects[key]
		if ok && o.policy != nil && o.policy.UID == uid {
			continue
		}
		c.DeletePolicy(uid)
		delete(i.policies, uid)
		delete(i.origins, uid)
		if !ok {
			delete(i.refused, key)
		}
	}
}

func (i *Inventory) problems() []source.Problem {
	problems := i.candidates.problems()
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

func objectKey(p *policy.Pod) manifest.Key {
	return manifest.Key{Kind: manifest.KindPod, Namespace: p.Namespace, Name: p.Name}
}

func samePod(a, b *policy.Pod) bool {
	return a == b || a.UID == b.UID && a.Namespace == b.Namespace && a.Name == b.Name &&
		maps.Equal(a.Labels, b.Labels) && slices.Equal(a.Addresses, b.Addresses) && slices.Equal(a.Ports, b.Ports) &&
		a.HostNetwork == b.HostNetwork && a.Terminating == b.Terminating && a.Local == b.Local && a.Audit == b.Audit
}

// Bindings answers the pod of each endpoint, as of the last Update. An endpoint
// whose pod is not known yet is missing. The answer is not to be changed, and is
// not changed by the next Update.
func (i *Inventory) Bindings() map[pinning.AttachmentKey]policy.PodKey { return i.bindings }

// Pods answers all pods as of the last Update, by namespace and name.
func (i *Inventory) Pods() []policy.Pod {
	pods := make([]policy.Pod, 0, len(i.candidates.pods))
	for _, r := range i.candidates.pods {
		if r.given != nil {
			pods = append(pods, *r.given)
		}
	}
	slices.SortFunc(pods, func(a, b policy.Pod) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name), cmp.Compare(a.Key, b.Key))
	})
	return pods
}

// Policy answers the object of the policy that the compiler knows by a UID.
func (i *Inventory) Policy(uid string) (manifest.Key, bool) {
	key, ok := i.origins[uid]
	return key, ok
}

// Counts answers how many policies, pods and namespaces the compiler has.
func (i *Inventory) Counts() (policies, pods, namespaces int) {
	return len(i.policies), len(i.candidates.pods), len(i.namespaces)
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
