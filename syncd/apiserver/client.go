// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"context"
	"errors"
	"fmt"
	"net/http"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/clientcmd"
)

// InCluster in place of a kubeconfig's path means the service account of the
// pod that the process runs in.
const InCluster = "in-cluster"

// Requests of one process a second, and at once. A watch is one request in
// five minutes or more; what is left is a restart of the server and events.
const (
	clientQPS   = 10
	clientBurst = 20
)

// Config reads a kubeconfig, or the service account if the path is
// [InCluster]. Tokens and certificates that it names by file are read again
// when they are renewed. The agent is what the API server logs of its client.
func Config(kubeconfig, agent string) (*rest.Config, error) {
	config, err := load(kubeconfig)
	if err != nil {
		return nil, fmt.Errorf("kubeconfig: %w", err)
	}
	config.UserAgent = agent
	config.ContentType = runtime.ContentTypeProtobuf
	config.AcceptContentTypes = runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON
	config.QPS, config.Burst = clientQPS, clientBurst
	return config, nil
}

func load(kubeconfig string) (*rest.Config, error) {
	if kubeconfig == InCluster {
		config, err := rest.InClusterConfig()
		if errors.Is(err, rest.ErrNotInCluster) {
			return nil, fmt.Errorf("%s is for pods of the cluster: run this in one, such as podgate's own, or name a file", InCluster)
		}
		return config, err
	}
	return clientcmd.NewNonInteractiveDeferredLoadingClientConfig(
		&clientcmd.ClientConfigLoadingRules{ExplicitPath: kubeconfig}, &clientcmd.ConfigOverrides{},
	).ClientConfig()
}

// resource is a kind of objects that the source follows.
type resource struct {
	kind, plural string
	group        schema.GroupVersion
	example      runtime.Object
	// name of the one object followed; empty for all.
	name string
}

// clients speak to the API groups over one connection.
type clients struct {
	config     *rest.Config
	http       *http.Client
	scheme     *runtime.Scheme
	codecs     serializer.CodecFactory
	interfaces map[schema.GroupVersion]rest.Interface
}

func newClients(config *rest.Config) (*clients, error) {
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{corev1.AddToScheme, discoveryv1.AddToScheme, networkingv1.AddToScheme} {
		if err := add(scheme); err != nil {
			return nil, err
		}
	}
	metav1.AddToGroupVersion(scheme, schema.GroupVersion{Version: "v1"})
	client, err := rest.HTTPClientFor(config)
	if err != nil {
		return nil, fmt.Errorf("API server %s: %w", config.Host, err)
	}
	return &clients{
		config: config, http: client, scheme: scheme, codecs: serializer.NewCodecFactory(scheme),
		interfaces: make(map[schema.GroupVersion]rest.Interface),
	}, nil
}

// group is the client of an API group.
func (c *clients) group(g schema.GroupVersion) (rest.Interface, error) {
	if client := c.interfaces[g]; client != nil {
		return client, nil
	}
	config := rest.CopyConfig(c.config)
	config.GroupVersion = &g
	config.APIPath = "/apis"
	if g.Group == "" {
		config.APIPath = "/api"
	}
	config.NegotiatedSerializer = trimming{c.codecs.WithoutConversion()}
	client, err := rest.RESTClientForConfigAndClient(config, c.http)
	if err != nil {
		return nil, fmt.Errorf("API server %s: %w", c.config.Host, err)
	}
	c.interfaces[g] = client
	return client, nil
}

// listWatch lists and watches a resource.
func (c *clients) listWatch(r *resource) (*cache.ListWatch, error) {
	if _, raw := r.example.(*unstructured.Unstructured); raw {
		return c.listWatchRaw(r)
	}
	client, err := c.group(r.group)
	if err != nil {
		return nil, err
	}
	selector := fields.Everything()
	if r.name != "" {
		selector = fields.OneTermEqualSelector(metav1.ObjectNameField, r.name)
	}
	return cache.NewListWatchFromClient(client, r.plural, metav1.NamespaceAll, selector), nil
}

// listWatchRaw lists and watches a resource with all the fields the server
// has, also those that this process has no type for.
func (c *clients) listWatchRaw(r *resource) (*cache.ListWatch, error) {
	client, err := dynamic.NewForConfigAndClient(dynamic.ConfigFor(c.config), c.http)
	if err != nil {
		return nil, fmt.Errorf("API server %s: %w", c.config.Host, err)
	}
	all := client.Resource(r.group.WithResource(r.plural))
	return &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, options metav1.ListOptions) (runtime.Object, error) {
			return all.List(ctx, options)
		},
		WatchFuncWithContext: func(ctx context.Context, options metav1.ListOptions) (watch.Interface, error) {
			return all.Watch(ctx, options)
		},
	}, nil
}
