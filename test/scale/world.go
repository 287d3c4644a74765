// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"container/heap"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"time"
)

// The shape of the cluster, whatever its size.
const (
	podsPerNode          = 30
	podsPerApp           = 15
	appsPerNamespace     = 5
	policiesPerNamespace = 5
	namespacesPerTeam    = 40
)

// size is how large a cluster is.
type size struct {
	Nodes, Namespaces, Pods, Policies, Services int
}

// sizeOf is a cluster of about as many pods.
func sizeOf(pods int) size {
	namespaces := max(2, pods/podsPerApp/appsPerNamespace)
	pods = namespaces * appsPerNamespace * podsPerApp
	return size{
		Nodes: max(2, pods/podsPerNode), Namespaces: namespaces, Pods: pods,
		Policies: namespaces * policiesPerNamespace, Services: namespaces * appsPerNamespace,
	}
}

type namespace struct {
	number             int
	name, team, friend string
	apps               []*app
	// extra policies that have been added lately.
	extra map[int]struct{}
}

type app struct {
	namespace *namespace
	name      string
	vip       netip.Addr
	pods      map[*pod]struct{}
}

func appName(i int) string { return fmt.Sprintf("app-%d", i) }

type pod struct {
	app    *app
	number int
	// node is -1 before it is scheduled.
	node         int
	address      netip.Addr
	ready, going bool
	// label is another one, for those that are measured.
	label string
}

func (p *pod) name() string { return fmt.Sprintf("%s-5d4f8c7b9-%05x", p.app.name, p.number) }

func (p *pod) uid() string {
	return fmt.Sprintf("%08x-0000-4000-8000-%012x", p.number, p.number)
}

func (p *pod) labels() map[string]string {
	l := map[string]string{"app": p.app.name, "pod-template-hash": "5d4f8c7b9", "app.kubernetes.io/managed-by": "Helm"}
	if p.label != "" {
		l["canary"] = p.label
	}
	return l
}

// world is the cluster as it is, and what will happen to it.
type world struct {
	size
	server     *apiServer
	namespaces []*namespace
	numbered   int
	// free addresses by node.
	free  [][]netip.Addr
	queue queue
}

// newWorld makes a cluster. Pods of node 0 have no addresses yet.
func newWorld(s size, server *apiServer) (*world, error) {
	w := &world{size: s, server: server, free: make([][]netip.Addr, s.Nodes)}
	for n := range w.free {
		for i := range 200 {
			w.free[n] = append(w.free[n], netip.AddrFrom4([4]byte{10, byte(n >> 8), byte(n), byte(i + 2)}))
		}
	}
	if err := server.put(nodesPath, nodeOf(0)); err != nil {
		return nil, err
	}
	teams := max(2, s.Namespaces/namespacesPerTeam)
	for i := range s.Namespaces {
		n := &namespace{
			number: i, name: fmt.Sprintf("ns-%d", i), team: fmt.Sprintf("team-%d", i%teams), friend: fmt.Sprintf("team-%d", (i+1)%teams),
			extra: make(map[int]struct{}),
		}
		w.namespaces = append(w.namespaces, n)
		if err := w.populate(n); err != nil {
			return nil, err
		}
	}
	return w, nil
}

func (w *world) populate(n *namespace) error {
	if err := w.server.put(namespacesPath, namespaceOf(n)); err != nil {
		return err
	}
	for i := range policiesPerNamespace {
		if err := w.server.put(policiesPath, policyOf(n, i)); err != nil {
			return err
		}
	}
	for i := range appsPerNamespace {
		number := n.number*appsPerNamespace + i
		a := &app{namespace: n, name: appName(i), pods: make(map[*pod]struct{}), vip: netip.AddrFrom4([4]byte{172, 20, byte(number >> 8), byte(number)})}
		n.apps = append(n.apps, a)
		for range podsPerApp {
			p := w.newPod(a)
			p.node = p.number % w.Nodes
			if p.node != 0 {
				w.start(p)
				p.ready = true
			}
			if err := w.server.put(podsPath, podOf(p)); err != nil {
				return err
			}
		}
		if err := w.server.put(servicesPath, serviceOf(a)); err != nil {
			return err
		}
		if err := w.server.put(slicesPath, sliceOf(a)); err != nil {
			return err
		}
	}
	return nil
}

func (w *world) newPod(a *app) *pod {
	p := &pod{app: a, number: w.numbered, node: -1}
	w.numbered++
	a.pods[p] = struct{}{}
	return p
}

// start gives a pod the address that was given back longest ago.
func (w *world) start(p *pod) {
	free := w.free[p.node]
	p.address, w.free[p.node] = free[0], free[1:]
}

// local are the pods of node 0.
func (w *world) local() (out []*pod) {
	for _, n := range w.namespaces {
		for _, a := range n.apps {
			for p := range a.pods {
				if p.node == 0 {
					out = append(out, p)
				}
			}
		}
	}
	return out
}

// step is something that happens at a time.
type step struct {
	at time.Time
	do func() error
}

type queue []step

func (q queue) Len() int           { return len(q) }
func (q queue) Less(i, j int) bool { return q[i].at.Before(q[j].at) }
func (q queue) Swap(i, j int)      { q[i], q[j] = q[j], q[i] }
func (q *queue) Push(x any)        { *q = append(*q, x.(step)) }
func (q *queue) Pop() any {
	old := *q
	last := old[len(old)-1]
	*q = old[:len(old)-1]
	return last
}

// eventsPerRoll is what replacing a pod costs.
const eventsPerRoll = 8

// roll replaces a pod by a new one elsewhere, as a Deployment does.
func (w *world) roll(now time.Time) {
	n := w.namespaces[rand.IntN(len(w.namespaces))]
	a := n.apps[rand.IntN(len(n.apps))]
	var old *pod
	for p := range a.pods {
		if p.ready && !p.going && p.node != 0 {
			old = p
			break
		}
	}
	if old == nil {
		return
	}
	old.ready = false // nobody else's to replace
	fresh := w.newPod(a)
	put := func(change func()) func() error {
		return func() error {
			change()
			return w.server.put(podsPath, podOf(fresh))
		}
	}
	slice := func() error {
		return w.server.put(slicesPath, sliceOf(a))
	}
	for _, s := range []struct {
		after time.Duration
		do    func() error
	}{
		{0, put(func() {})},
		{20 * time.Millisecond, put(func() { fresh.node = 1 + rand.IntN(w.Nodes-1) })},
		{700 * time.Millisecond, put(func() { w.start(fresh) })},
		{1500 * time.Millisecond, put(func() { fresh.ready = true })},
		{1510 * time.Millisecond, slice},
		{1600 * time.Millisecond, func() error {
			old.going = true
			return w.server.put(podsPath, podOf(old))
		}},
		{1610 * time.Millisecond, slice},
		{3 * time.Second, func() error {
			delete(a.pods, old)
			w.free[old.node] = append(w.free[old.node], old.address)
			return w.server.remove(podsPath, podOf(old))
		}},
	} {
		heap.Push(&w.queue, step{now.Add(s.after), s.do})
	}
}

// edit adds a policy, or takes the last one away again.
func (w *world) edit() error {
	n := w.namespaces[rand.IntN(len(w.namespaces))]
	for i := range n.extra {
		delete(n.extra, i)
		return w.server.remove(policiesPath, policyOf(n, i))
	}
	i := policiesPerNamespace + rand.IntN(policiesPerNamespace)
	n.extra[i] = struct{}{}
	return w.server.put(policiesPath, policyOf(n, i))
}

// relabel makes a namespace another team's.
func (w *world) relabel() error {
	n := w.namespaces[rand.IntN(len(w.namespaces))]
	n.team = w.namespaces[rand.IntN(len(w.namespaces))].team
	return w.server.put(namespacesPath, namespaceOf(n))
}

// churn changes the cluster at a rate of events a second: pods are replaced, one
// event in a hundred edits a policy, one in a thousand relabels a namespace.
func (w *world) churn(rate int, until <-chan struct{}) error {
	began := time.Now()
	var rolls, edits, relabels float64
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-until:
			return nil
		case <-tick.C:
		}
		now := time.Now()
		due := now.Sub(began).Seconds() * float64(rate)
		for ; rolls < due*0.989/eventsPerRoll; rolls++ {
			w.roll(now)
		}
		for ; edits < due*0.01; edits++ {
			if err := w.edit(); err != nil {
				return err
			}
		}
		for ; relabels < due*0.001; relabels++ {
			if err := w.relabel(); err != nil {
				return err
			}
		}
		for len(w.queue) > 0 && !w.queue[0].at.After(now) {
			if err := heap.Pop(&w.queue).(step).do(); err != nil {
				return err
			}
		}
	}
}
