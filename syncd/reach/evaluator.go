// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package reach

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"

	"github.com/podgate/podgate/bpf/policy"
	"github.com/podgate/podgate/pinning"
	"github.com/podgate/podgate/syncd/inventory"
	"github.com/podgate/podgate/syncd/manifest"
	"github.com/podgate/podgate/syncd/nodeaddr"
	"github.com/podgate/podgate/syncd/source"
)

// FromDirectory answers about the manifests in a directory as if every pod in
// them ran here. Pods without an address get one, see [Evaluator.Assumed].
// Nothing pinned is read. The programs and tables are loaded for this process
// alone; where that is not possible (it needs CAP_BPF) KernelErr says why and
// the compiler answers alone. auditPods is as in [inventory.Options].
func FromDirectory(ctx context.Context, dir string, auditPods bool, logger *slog.Logger) (*Evaluator, error) {
	batch, err := source.NewDirectory(source.DirectoryOptions{Path: dir, Logger: logger}).Load(ctx)
	if err != nil {
		return nil, err
	}
	e := newEvaluator()
	e.assumeAddresses(batch.Set)
	e.take(batch, inventory.Options{AllLocal: true, AuditPods: auditPods}, nil)
	update := e.compile()
	if e.state, e.KernelErr = e.private(ctx, update, logger); e.KernelErr == nil {
		e.owned = true
	}
	return e, nil
}

// Node says where to find what a node's daemon reads.
type Node struct {
	// Source is what the daemon follows; without one only the kernel answers, and
	// only about the pods attached here. Sourceless says why there is none.
	Source     source.Source
	Sourceless error
	// Name, Unlisted and AuditPods as of [inventory.Options].
	Name                string
	Unlisted, AuditPods bool
}

// FromNode answers about what is enforced on this node: the compiler from what
// the daemon follows, the kernel from what is pinned. The state is read
// and stays the caller's.
func FromNode(ctx context.Context, state *pinning.State, n Node) (*Evaluator, error) {
	e := newEvaluator()
	e.state = state
	var endpoints []pinning.Endpoint
	for ep, err := range state.Endpoints() {
		if err != nil {
			return nil, err
		}
		endpoints = append(endpoints, ep)
	}
	addrs, err := nodeaddr.List()
	if err != nil {
		return nil, err
	}
	for _, a := range addrs {
		e.node[a] = struct{}{}
	}
	var batch source.Batch
	if n.Source == nil {
		e.PolicyErr = n.Sourceless
	} else if batch, err = n.Source.Load(ctx); err != nil {
		e.PolicyErr = err
	}
	e.take(batch, inventory.Options{
		Node: n.Name, Unlisted: n.Unlisted || n.Source == nil, AllLocal: true, AuditPods: n.AuditPods,
	}, endpoints)
	e.takeServices(batch, addrs)
	bindings := e.inventory.Bindings()
	for _, ep := range endpoints {
		if key, ok := bindings[ep.Key]; ok {
			e.gates[key] = append(e.gates[key], gate{ep.Gate, ep.Addresses})
		}
	}
	return e, nil
}

func newEvaluator() *Evaluator {
	return &Evaluator{
		compiler: policy.NewCompiler(),
		gates:    make(map[policy.PodKey][]gate),
		assumed:  make(map[netip.Addr]struct{}),
		node:     make(map[netip.Addr]struct{}),
		services: make(map[frontend]pinning.Service),
		pods:     make(map[netip.Addr]policy.Pod),
	}
}

// take fills inventory and compiler.
func (e *Evaluator) take(batch source.Batch, opts inventory.Options, endpoints []pinning.Endpoint) {
	e.inventory = inventory.New(opts)
	e.inventory.Apply(batch)
	e.inventory.SetEndpoints(endpoints)
	e.Problems = append(batch.Problems, e.inventory.Update(e.compiler)...)
	for _, p := range e.inventory.Pods() {
		if p.HostNetwork {
			continue
		}
		for _, a := range p.Addresses {
			if _, taken := e.pods[a]; !taken {
				e.pods[a] = p
			}
		}
	}
}

// compile has the compiler answer from now on. Who only wants to know the pods
// does without: in a large cluster it takes long.
func (e *Evaluator) compile() policy.Update {
	e.compiled = true
	return e.compiler.Compile()
}

// private loads the update into tables of this process, with a gate for every
// pod.
func (e *Evaluator) private(ctx context.Context, update policy.Update, logger *slog.Logger) (_ *pinning.State, err error) {
	pods := e.inventory.Pods()
	state, err := pinning.NewPrivate(ctx, pinning.Options{
		// No packets pass: what only they need may be small.
		Capacity: pinning.Capacity{Endpoints: uint32(len(pods) + 1), Flows: 1024, Fragments: 64, EventBytes: 4096},
		Logger:   logger,
	})
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, state.Close())
		}
	}()
	applied, err := state.Apply(ctx, update)
	if err := errors.Join(append(applied.Problems, err)...); err != nil {
		return nil, err
	}
	for i := range pods {
		p := &pods[i]
		if p.HostNetwork || len(p.Addresses) == 0 {
			continue
		}
		number, err := state.PrivateGate(p.Key, p.Addresses)
		if err != nil {
			return nil, fmt.Errorf("gate for %s: %w", podName(p), err)
		}
		e.gates[p.Key] = []gate{{number, p.Addresses}}
	}
	return state, nil
}

// assumeAddresses gives pods without an address one from the ranges set aside
// for benchmarks (RFC 2544, RFC 5180), of both families.
func (e *Evaluator) assumeAddresses(objects []manifest.Object) {
	taken := make(map[netip.Addr]struct{})
	for _, o := range objects {
		if o.Pod != nil {
			for _, a := range o.Pod.Addresses {
				taken[a] = struct{}{}
			}
		}
	}
	next := [2]netip.Addr{netip.MustParseAddr("198.18.0.0"), netip.MustParseAddr("2001:2::")}
	for _, o := range objects {
		if o.Pod == nil || o.Ended || o.Pod.HostNetwork || len(o.Pod.Addresses) > 0 {
			continue
		}
		for i := range next {
			for next[i] = next[i].Next(); ; next[i] = next[i].Next() {
				if _, used := taken[next[i]]; !used {
					break
				}
			}
			o.Pod.Addresses = append(o.Pod.Addresses, next[i])
			e.assumed[next[i]] = struct{}{}
		}
	}
}
