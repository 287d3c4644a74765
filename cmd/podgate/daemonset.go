// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/go-logr/logr"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	kruntime "k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"

	"github.com/podgate/podgate/syncd/apiserver"
)

// daemonSet is the DaemonSet that this process is part of.
type daemonSet struct {
	namespace, name string
	client          metadata.ResourceInterface
	namespaces      metadata.ResourceInterface

	log  *slog.Logger
	once sync.Once

	mu sync.Mutex
	// gone says that it was there and has been deleted since, or is about to be.
	gone bool
}

func newDaemonSet(kubeconfig, key string, log *slog.Logger) (*daemonSet, error) {
	namespace, name, ok := strings.Cut(key, "/")
	if !ok || namespace == "" || name == "" {
		return nil, fmt.Errorf("--uninstall-with %q is not like NAMESPACE/NAME", key)
	}
	config, err := apiserver.Config(kubeconfig, "podgate/"+version)
	if err != nil {
		return nil, err
	}
	client, err := metadata.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("API server %s: %w", config.Host, err)
	}
	resource := schema.GroupVersionResource{Group: "apps", Version: "v1", Resource: "daemonsets"}
	return &daemonSet{
		log: log, namespace: namespace, name: name, client: client.Resource(resource).Namespace(namespace),
		namespaces: client.Resource(schema.GroupVersionResource{Version: "v1", Resource: "namespaces"}),
	}, nil
}

func (d *daemonSet) String() string { return d.namespace + "/" + d.name }

// follow notes the deletion until ctx is done. Whoever deletes podgate as a whole
// also deletes what lets its pods ask, often before they are told to end.
func (d *daemonSet) follow(ctx context.Context) {
	only := fields.OneTermEqualSelector(metav1.ObjectNameField, d.name).String()
	_, informer := cache.NewInformerWithOptions(cache.InformerOptions{
		ObjectType: &metav1.PartialObjectMetadata{},
		ListerWatcher: &cache.ListWatch{
			ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (kruntime.Object, error) {
				o.FieldSelector = only
				return d.client.List(ctx, o)
			},
			WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
				o.FieldSelector = only
				return d.client.Watch(ctx, o)
			},
		},
		Handler: cache.ResourceEventHandlerFuncs{
			AddFunc:    func(o any) { d.note(o) },
			UpdateFunc: func(_, o any) { d.note(o) },
			DeleteFunc: func(any) { d.note(nil) },
		},
	})
	// A server that does not answer is no news: the daemon says so too.
	ctx = klog.NewContext(ctx, logr.Discard())
	informer.RunWithContext(ctx)
}

func (d *daemonSet) note(object any) {
	d.once.Do(func() { d.log.Info("podgate is taken off this node if it is deleted", "daemonset", d) })
	d.mu.Lock()
	defer d.mu.Unlock()
	o, ok := object.(*metav1.PartialObjectMetadata)
	d.gone = !ok || !o.DeletionTimestamp.IsZero()
}

// askAgain is how long after a failure the server is asked again.
const askAgain = 200 * time.Millisecond

// deleted tells whether the DaemonSet was deleted, or its namespace is about to
// be. Where the server does not say, because the right to ask went first, what is
// seen of it until ctx ends counts; if that is nothing the error says why.
func (d *daemonSet) deleted(ctx context.Context) (bool, error) {
	for {
		gone, err := d.ask(ctx)
		if err == nil {
			return gone, nil
		}
		if d.isGone() {
			return true, nil
		}
		select {
		case <-ctx.Done():
			return false, err
		case <-time.After(askAgain):
		}
	}
}

func (d *daemonSet) ask(ctx context.Context) (gone bool, err error) {
	o, err := d.client.Get(ctx, d.name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return true, nil
	}
	if err != nil || !o.DeletionTimestamp.IsZero() {
		return err == nil, err
	}
	// The pods of a namespace that is deleted may go before their owners.
	only := fields.OneTermEqualSelector(metav1.ObjectNameField, d.namespace).String()
	namespaces, err := d.namespaces.List(ctx, metav1.ListOptions{FieldSelector: only})
	if err != nil {
		return false, err
	}
	return len(namespaces.Items) == 0 || !namespaces.Items[0].DeletionTimestamp.IsZero(), nil
}

func (d *daemonSet) isGone() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.gone
}
