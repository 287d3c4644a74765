// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"cmp"
	"context"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"
	"k8s.io/klog/v2"

	"github.com/podgate/podgate/syncd/manifest"
	"github.com/podgate/podgate/syncd/source"
)

// Options of a [Source].
type Options struct {
	// Config of the client, see [Config].
	Config *rest.Config
	// Node is this node's name. Of pods that run elsewhere only those are
	// delivered that have an address.
	Node string
	// Names asks for what an observer names traffic by, and not for policy:
	// Pods with their workloads, Namespaces, and all Nodes with their addresses.
	Names bool
	// Patience is how long the server may take to answer before that is a
	// problem, default 10 s; a fifth of it is how long it may refuse to.
	Patience time.Duration
	Logger   *slog.Logger
}

// Source is a [source.Source] of the objects of an API server.
type Source struct {
	opts      Options
	clients   *clients
	followers []*follower
	changed   chan struct{}

	mu sync.Mutex
	// touched are the objects that differ from what was delivered; nil is gone.
	touched map[manifest.Key]*manifest.Object
	// recorder writes events while Run runs.
	recorder record.EventRecorder
}

// New is a source that has not begun. It fails only for a configuration that
// cannot work; the server need not answer.
func New(opts Options) (*Source, error) {
	opts.Patience = cmp.Or(opts.Patience, 10*time.Second)
	if opts.Logger == nil {
		opts.Logger = slog.New(slog.DiscardHandler)
	}
	clients, err := newClients(opts.Config)
	if err != nil {
		return nil, err
	}
	s := &Source{
		opts:    opts,
		clients: clients,
		changed: make(chan struct{}, 1),
		touched: make(map[manifest.Key]*manifest.Object),
	}
	for _, r := range resources(&opts) {
		f, err := s.follow(r)
		if err != nil {
			return nil, err
		}
		s.followers = append(s.followers, f)
	}
	return s, nil
}

// resources are what the source follows.
func resources(o *Options) []resource {
	core := corev1.SchemeGroupVersion
	out := []resource{
		{kind: manifest.KindPod, plural: "pods", group: core, example: &corev1.Pod{}},
		{kind: manifest.KindNamespace, plural: "namespaces", group: core, example: &corev1.Namespace{}},
	}
	if o.Names {
		return append(out, resource{kind: manifest.KindNode, plural: "nodes", group: core, example: &corev1.Node{}})
	}
	return append(out,
		resource{kind: manifest.KindNetworkPolicy, plural: "networkpolicies", group: networkingv1.SchemeGroupVersion, example: &unstructured.Unstructured{}},
		resource{kind: manifest.KindService, plural: "services", group: core, example: &corev1.Service{}},
		resource{kind: manifest.KindEndpointSlice, plural: "endpointslices", group: discoveryv1.SchemeGroupVersion, example: &discoveryv1.EndpointSlice{}},
		// To see whether it exists.
		resource{kind: manifest.KindNode, plural: "nodes", group: core, example: &corev1.Node{}, name: o.Node},
	)
}

// Load reads the whole state once. It fails when the server does not answer
// within the patience of the options.
func (s *Source) Load(ctx context.Context) (source.Batch, error) {
	ctx, cancel := context.WithCancel(s.quiet(ctx))
	wait := s.start(ctx)
	defer func() {
		cancel()
		wait()
	}()
	patience := time.After(s.opts.Patience)
	for !s.knowsAll() {
		select {
		case <-ctx.Done():
			return source.Batch{}, ctx.Err()
		case <-patience:
			return source.Batch{}, s.silence()
		case <-s.changed:
		}
	}
	return s.take(), nil
}

// Run delivers the state and its changes. Changes that come while one batch is
// worked on make the next one.
func (s *Source) Run(ctx context.Context, deliver func(source.Batch)) error {
	ctx = s.quiet(ctx)
	stop, err := s.record(ctx)
	if err != nil {
		return err
	}
	defer stop()
	wait := s.start(ctx)
	defer wait()
	look := time.NewTicker(s.opts.Patience / 5)
	defer look.Stop()
	var standing source.Batch
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-s.changed:
		case <-look.C:
		}
		batch := s.take()
		if len(batch.Set)+len(batch.Gone) > 0 || !slices.Equal(batch.Problems, standing.Problems) || !slices.Equal(batch.Pending, standing.Pending) {
			deliver(batch)
			standing = source.Batch{Problems: batch.Problems, Pending: batch.Pending} // not all the objects
		}
	}
}

// start begins to follow the server and answers how to wait for the end of it.
func (s *Source) start(ctx context.Context) (wait func()) {
	var running sync.WaitGroup
	for _, f := range s.followers {
		running.Go(func() {
			cache.NewReflectorWithOptions(f, f.example, f, cache.ReflectorOptions{Name: "podgate"}).RunWithContext(ctx)
		})
	}
	return running.Wait
}

// quiet lets the client log at debug level: it logs each attempt that fails,
// which is what problems are for.
func (s *Source) quiet(ctx context.Context) context.Context {
	return klog.NewContext(ctx, logr.FromSlogHandler(quiet{s.opts.Logger.Handler()}))
}

// notify makes Run look.
func (s *Source) notify() {
	select {
	case s.changed <- struct{}{}:
	default:
	}
}

// take answers what has changed since it was last called. Objects of a kind
// wait until all of them are known.
func (s *Source) take() source.Batch {
	s.mu.Lock()
	defer s.mu.Unlock()
	var batch source.Batch
	kinds := make(map[string]*follower, len(s.followers))
	for _, f := range s.followers {
		if f.synced {
			kinds[f.kind] = f
		} else {
			batch.Pending = append(batch.Pending, f.kind)
		}
	}
	// A map that was emptied would keep the room for as many as it ever had.
	waiting := make(map[manifest.Key]*manifest.Object)
	for key, o := range s.touched {
		switch {
		case kinds[key.Kind] == nil:
			waiting[key] = o
		case o != nil:
			batch.Set = append(batch.Set, *o)
		default:
			batch.Gone = append(batch.Gone, key)
		}
	}
	s.touched = waiting
	slices.SortFunc(batch.Set, func(a, b manifest.Object) int { return a.Compare(b.Key) })
	slices.SortFunc(batch.Gone, manifest.Key.Compare)
	batch.Problems = s.problems(time.Now())
	return batch
}
