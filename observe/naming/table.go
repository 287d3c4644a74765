// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package naming

import (
	"cmp"
	"errors"
	"iter"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/podgate/podgate/bpf/flow"
	"github.com/podgate/podgate/bpf/policy"
	"github.com/podgate/podgate/pinning"
	"github.com/podgate/podgate/syncd/manifest"
	"github.com/podgate/podgate/syncd/source"
)

// State is what a [Table] reads of the pinned maps; a [pinning.State].
type State interface {
	Endpoints() iter.Seq2[pinning.Endpoint, error]
	Rule(id uint32) (pinning.Rule, error)
	RulesetPolicies(id uint32) ([]policy.PolicyInfo, error)
	ServiceAt(f netip.AddrPort, p policy.Protocol) (pinning.Service, error)
}

// Options of a [Table].
type Options struct {
	// Node is this node's name, Cluster that of its cluster.
	Node, Cluster string
	// Local answers the addresses of the node itself; nil if nobody knows.
	Local func() ([]netip.Addr, error)
}

// stale is after what time numbers are looked up again. They are given to others
// as late as possible, which takes longer.
const stale = 5 * time.Second

// patience is how often it is looked whether an unknown endpoint has come.
const patience = 100 * time.Millisecond

// limit bounds each of the caches that grow with traffic.
const limit = 8192

// Node of the cluster.
type Node struct {
	Name      string
	Addresses []netip.Addr
}

// Rule that decided, with its policy.
type Rule struct {
	policy.RuleInfo
	Policy policy.PolicyInfo
}

// Service by its name.
type Service struct{ Namespace, Name, PortName string }

// Table has the names of one node's traffic. It is safe for concurrent use.
type Table struct {
	opts                Options
	world, host, remote *Party

	mu    sync.Mutex
	state State
	// What the source said.
	pods       map[manifest.Key]manifest.Object
	namespaces map[string]map[string]string
	nodes      map[string]Node
	// owners of addresses, and the addresses of nodes, which follow from that.
	owners map[netip.Addr][]manifest.Key
	byNode map[netip.Addr]struct{}
	// nodesChanged is closed when nodes are not what they were.
	nodesChanged chan struct{}

	// What was read of the state. Events of endpoints that have just gone are
	// still under way: former are those of the reading before.
	dirty             bool
	read              time.Time
	endpoints, former map[uint32]*Party
	attached          map[netip.Addr]*Party
	local             map[netip.Addr]struct{}

	// Caches.
	peers    map[netip.Addr]*Party
	rules    map[uint32]*Rule
	rulesets map[uint32][]policy.PolicyInfo
	services map[frontend]*Service
	cached   time.Time
}

type frontend struct {
	at       netip.AddrPort
	protocol policy.Protocol
}

// NewTable is a table without names.
func NewTable(opts Options) *Table {
	t := &Table{
		opts:  opts,
		world: World(), host: Host(), remote: RemoteNode(),
		pods:         make(map[manifest.Key]manifest.Object),
		namespaces:   make(map[string]map[string]string),
		nodes:        make(map[string]Node),
		owners:       make(map[netip.Addr][]manifest.Key),
		nodesChanged: make(chan struct{}),
		dirty:        true,
	}
	t.forget(time.Time{})
	return t
}

// Use makes the table read this state from now on; nil for none. The state is
// the table's until the next Use.
func (t *Table) Use(s State) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.state = s
	t.endpoints, t.former, t.attached = nil, nil, nil
	t.dirty = true
	t.forget(time.Time{})
}

// Touch says that endpoints may have changed.
func (t *Table) Touch() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.dirty = true
}

// forget empties the caches.
func (t *Table) forget(now time.Time) {
	t.peers = make(map[netip.Addr]*Party)
	t.rules, t.rulesets = make(map[uint32]*Rule), make(map[uint32][]policy.PolicyInfo)
	t.services = make(map[frontend]*Service)
	t.cached = now
}

// Apply takes a batch of a source.
func (t *Table) Apply(b source.Batch) {
	t.mu.Lock()
	defer t.mu.Unlock()
	nodes := false
	for _, k := range b.Gone {
		switch k.Kind {
		case manifest.KindPod:
			t.disown(k)
			delete(t.pods, k)
		case manifest.KindNamespace:
			delete(t.namespaces, k.Name)
			t.dirty = true
		case manifest.KindNode:
			delete(t.nodes, k.Name)
			nodes = true
		}
	}
	for _, o := range b.Set {
		switch {
		case o.Pod != nil:
			t.disown(o.Key)
			t.pods[o.Key] = o
			for _, a := range podAddresses(&o) {
				t.owners[a] = append(t.owners[a], o.Key)
			}
			t.dirty = t.dirty || o.Node == "" || o.Node == t.opts.Node
		case o.Namespace != nil:
			t.namespaces[o.Name] = o.Namespace.Labels
			t.dirty = true
		case o.Kind == manifest.KindNode:
			if slices.Equal(t.nodes[o.Name].Addresses, o.Addresses) && t.nodes[o.Name].Name != "" {
				continue
			}
			t.nodes[o.Name] = Node{Name: o.Name, Addresses: o.Addresses}
			nodes = true
		}
	}
	if nodes {
		t.byNode = make(map[netip.Addr]struct{})
		for _, n := range t.nodes {
			for _, a := range n.Addresses {
				t.byNode[a] = struct{}{}
			}
		}
		close(t.nodesChanged)
		t.nodesChanged = make(chan struct{})
	}
	clear(t.peers)
}

func (t *Table) disown(k manifest.Key) {
	old, ok := t.pods[k]
	if !ok {
		return
	}
	for _, a := range podAddresses(&old) {
		t.owners[a] = slices.DeleteFunc(t.owners[a], func(o manifest.Key) bool { return o == k })
		if len(t.owners[a]) == 0 {
			delete(t.owners, a)
		}
	}
}

// podAddresses are those that name a pod: on the host network they name a node.
func podAddresses(o *manifest.Object) []netip.Addr {
	if o.Pod.HostNetwork || o.Ended {
		return nil
	}
	return o.Pod.Addresses
}

// Nodes of the cluster by name, and a channel that is closed when they change.
func (t *Table) Nodes() ([]Node, <-chan struct{}) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.SortedFunc(maps.Values(t.nodes), func(a, b Node) int { return cmp.Compare(a.Name, b.Name) }), t.nodesChanged
}

// Names are the names of one flow.
type Names struct {
	Local, Peer *Party
	// Rule that decided, nil if none did or it is gone.
	Rule *Rule
	// Isolating are the policies whose isolation decided, where no rule matched.
	Isolating []policy.PolicyInfo
	// Service over which the peer was asked for; nil if none is known.
	Service *Service
}

// Name names flows, at now; names[i] are those of flows[i]. The error is about
// what could not be read; flows have names nevertheless, if poorer ones.
func (t *Table) Name(now time.Time, flows []flow.Flow, names []Names) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if now.Sub(t.cached) > stale || len(t.peers)+len(t.services) > limit {
		t.forget(now)
	}
	// An endpoint that is not known may have come meanwhile, or be long gone.
	unknown := func(f flow.Flow) bool { return t.endpoints[f.Endpoint] == nil && t.former[f.Endpoint] == nil }
	var err error
	if t.dirty || now.Sub(t.read) > patience && slices.ContainsFunc(flows, unknown) {
		err = t.readEndpoints()
		t.read = now
	}
	for i := range flows {
		names[i] = t.name(&flows[i])
	}
	return err
}

func (t *Table) name(f *flow.Flow) Names {
	n := Names{Local: t.endpoint(f), Peer: t.peer(f.Peer.Addr()), Rule: t.rule(f.Rule)}
	if n.Rule != nil && n.Rule.Index < 0 {
		n.Isolating = t.isolating(f.Ruleset)
	}
	if f.Frontend.IsValid() {
		n.Service = t.service(f.Frontend, f.Protocol)
	} else if f.Direction == policy.Egress && f.Peer.Port() != 0 {
		n.Service = t.service(f.Peer, f.Protocol)
	}
	return n
}

// Endpoint names an endpoint.
func (t *Table) Endpoint(ep *pinning.Endpoint) *Party {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.endpointParty(ep)
}

// ByID names an endpoint by its number; one that is gone is [World].
func (t *Table) ByID(id uint32) *Party {
	t.mu.Lock()
	defer t.mu.Unlock()
	return cmp.Or(t.endpoints[id], t.former[id], t.world)
}

// endpoint names the pod's side of a flow. Its address does if nothing else is
// known.
func (t *Table) endpoint(f *flow.Flow) *Party {
	for _, known := range []map[uint32]*Party{t.endpoints, t.former} {
		if p := known[f.Endpoint]; p != nil {
			return p
		}
	}
	return t.peer(f.Local.Addr())
}

func (t *Table) peer(a netip.Addr) *Party {
	if p := t.peers[a]; p != nil {
		return p
	}
	p := t.findPeer(a)
	t.peers[a] = p
	return p
}

func (t *Table) findPeer(a netip.Addr) *Party {
	if p := t.attached[a]; p != nil {
		return p
	}
	if _, ok := t.local[a]; ok {
		return t.host
	}
	if o, ok := t.owner(a); ok {
		return t.party(o.Pod, o.Workload, 0)
	}
	if _, ok := t.byNode[a]; ok {
		return t.remote
	}
	return t.world
}

// owner is the pod that has an address: of several the youngest that is not
// going.
func (t *Table) owner(a netip.Addr) (manifest.Object, bool) {
	var best manifest.Object
	for _, k := range t.owners[a] {
		o := t.pods[k]
		if best.Pod == nil || best.Pod.Terminating && !o.Pod.Terminating ||
			best.Pod.Terminating == o.Pod.Terminating && o.Created.After(best.Created) {
			best = o
		}
	}
	return best, best.Pod != nil
}

func (t *Table) rule(id uint32) *Rule {
	if id == 0 || t.state == nil {
		return nil
	}
	if r, ok := t.rules[id]; ok {
		return r
	}
	var r *Rule
	if got, err := t.state.Rule(id); err == nil && got.Policy.Name != "" {
		r = &Rule{RuleInfo: got.RuleInfo, Policy: got.Policy}
	} // a rule that is gone has no name
	t.rules[id] = r
	return r
}

func (t *Table) isolating(ruleset uint32) []policy.PolicyInfo {
	if p, ok := t.rulesets[ruleset]; ok {
		return p
	}
	p, _ := t.state.RulesetPolicies(ruleset) // one that is gone has no policies
	t.rulesets[ruleset] = p
	return p
}

func (t *Table) service(at netip.AddrPort, p policy.Protocol) *Service {
	if t.state == nil {
		return nil
	}
	key := frontend{at, p}
	if s, ok := t.services[key]; ok {
		return s
	}
	var s *Service
	if got, err := t.state.ServiceAt(at, p); err == nil {
		s = &Service{got.Namespace, got.Name, got.PortName}
	} // else it is none, or gone meanwhile
	t.services[key] = s
	return s
}

// readEndpoints reads the endpoints and the node's addresses.
func (t *Table) readEndpoints() error {
	var errs []error
	if t.opts.Local != nil {
		addrs, err := t.opts.Local()
		errs = append(errs, err)
		t.local = make(map[netip.Addr]struct{}, len(addrs))
		for _, a := range addrs {
			t.local[a] = struct{}{}
		}
	}
	clear(t.peers)
	t.dirty = false
	if t.state == nil {
		return errors.Join(errs...)
	}
	endpoints, attached := make(map[uint32]*Party), make(map[netip.Addr]*Party)
	for ep, err := range t.state.Endpoints() {
		if err != nil {
			errs = append(errs, err)
			continue
		}
		p := t.endpointParty(&ep)
		endpoints[ep.ID] = p
		for _, a := range ep.Addresses {
			// Two pods may have the same link-local address.
			if a = a.Unmap(); !a.IsLinkLocalUnicast() {
				attached[a] = p
			}
		}
	}
	t.endpoints, t.former, t.attached = endpoints, t.endpoints, attached
	return errors.Join(errs...)
}

// endpointParty is the pod of an endpoint as the source knows it, or else as the
// runtime does.
func (t *Table) endpointParty(ep *pinning.Endpoint) *Party {
	namespace := cmp.Or(ep.PodNamespace, corev1.NamespaceDefault)
	name := cmp.Or(ep.PodName, ep.Key.ContainerID)
	if o, ok := t.pods[manifest.Key{Kind: manifest.KindPod, Namespace: namespace, Name: name}]; ok {
		return t.party(o.Pod, o.Workload, ep.ID)
	}
	return t.party(&policy.Pod{Namespace: namespace, Name: name, Labels: ep.Labels}, manifest.Workload{}, ep.ID)
}

func (t *Table) party(pod *policy.Pod, w manifest.Workload, endpoint uint32) *Party {
	labels, ok := t.namespaces[pod.Namespace]
	if !ok {
		labels = manifest.NamespaceOf(pod.Namespace, nil).Labels
	}
	return podParty(pod, w, labels, t.opts.Cluster, endpoint)
}
