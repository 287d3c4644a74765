// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package netlab

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
)

// PodSpec is what a container runtime knows of a pod.
type PodSpec struct {
	// ID of the sandbox container; random when empty.
	ID string
	// Namespace, Name and UID become the K8S_POD_* keys of CNI_ARGS. Without a
	// Name there is no CNI_ARGS, as with runtimes that have no pods.
	Namespace, Name, UID string
	// IfName is CNI_IFNAME, eth0 when empty.
	IfName string
	// Labels are passed as args.cni.labels.
	Labels map[string]string
	// Capabilities are the runtime's capability arguments: portMappings,
	// bandwidth, mac, ips.
	Capabilities map[string]any
}

// Pod is a network namespace that plays a pod.
type Pod struct {
	PodSpec

	ns   *namespace
	list Conflist
}

// NewPod makes a pod without a network. The caller must close it.
func NewPod(spec PodSpec) (*Pod, error) {
	if spec.ID == "" {
		id := make([]byte, 32)
		rand.Read(id)
		spec.ID = hex.EncodeToString(id)
	}
	if spec.IfName == "" {
		spec.IfName = "eth0"
	}
	ns, err := newNamespace()
	if err != nil {
		return nil, fmt.Errorf("netlab: new pod: %w", err)
	}
	return &Pod{PodSpec: spec, ns: ns}, nil
}

// NetNS is a path of the pod's network namespace. It is gone when the pod is
// closed.
func (p *Pod) NetNS() string { return p.ns.path() }

// Do runs fn in the pod's network namespace; see [Node.Do].
func (p *Pod) Do(fn func() error) error { return p.ns.do(fn) }

// Exec runs a command in the pod's network namespace; see [Node.Exec].
func (p *Pod) Exec(ctx context.Context, name string, args ...string) ([]byte, error) {
	return p.ns.exec(ctx, name, args...)
}

// Close ends the pod's network namespace without a word to any plugin.
func (p *Pod) Close() error { return p.ns.Close() }

// Interface is the same pod seen through another attachment.
func (p *Pod) Interface(name string) *Pod {
	view := *p
	view.IfName = name
	return &view
}

// AddPod makes a pod and its network. When that fails it calls DEL and ends the
// pod, as runtimes do.
func (n *Node) AddPod(ctx context.Context, list Conflist, spec PodSpec) (*Pod, *types100.Result, error) {
	p, err := NewPod(spec)
	if err != nil {
		return nil, nil, err
	}
	p.list = list
	result, err := n.Add(ctx, list, p)
	if err != nil {
		return nil, nil, errors.Join(err, n.Del(ctx, list, p), p.Close())
	}
	r, err := types100.NewResultFromResult(result)
	if err != nil {
		return nil, nil, errors.Join(err, n.DelPod(ctx, p))
	}
	return p, r, nil
}

// DelPod takes a pod of [Node.AddPod] out of its network and ends it.
func (n *Node) DelPod(ctx context.Context, p *Pod) error {
	return errors.Join(n.Del(ctx, p.list, p), p.Close())
}

// Add runs ADD of the whole chain and returns the last plugin's result, in the
// version of the list.
func (n *Node) Add(ctx context.Context, list Conflist, p *Pod) (result types.Result, err error) {
	err = n.run(list, p, func(c *libcni.NetworkConfigList, rt *libcni.RuntimeConf) (err error) {
		result, err = n.cni.AddNetworkList(ctx, c, rt)
		return err
	})
	return result, err
}

// Del runs DEL of the whole chain in reverse order.
func (n *Node) Del(ctx context.Context, list Conflist, p *Pod) error {
	return n.run(list, p, func(c *libcni.NetworkConfigList, rt *libcni.RuntimeConf) error {
		return n.cni.DelNetworkList(ctx, c, rt)
	})
}

// Check runs CHECK of the whole chain with the cached result of ADD.
func (n *Node) Check(ctx context.Context, list Conflist, p *Pod) error {
	return n.run(list, p, func(c *libcni.NetworkConfigList, rt *libcni.RuntimeConf) error {
		return n.cni.CheckNetworkList(ctx, c, rt)
	})
}

// GC runs GC of the whole chain. libcni first calls DEL for each attachment of
// its own cache that args does not name; nil args name none and give the
// plugins no list.
func (n *Node) GC(ctx context.Context, list Conflist, args *libcni.GCArgs) error {
	return n.run(list, nil, func(c *libcni.NetworkConfigList, _ *libcni.RuntimeConf) error {
		return n.cni.GCNetworkList(ctx, c, args)
	})
}

// Status runs STATUS of the whole chain up to the first plugin that is not
// ready.
func (n *Node) Status(ctx context.Context, list Conflist) error {
	return n.run(list, nil, func(c *libcni.NetworkConfigList, _ *libcni.RuntimeConf) error {
		return n.cni.GetStatusNetworkList(ctx, c)
	})
}

// run calls fn in the node's namespace, with p's labels and runtime
// configuration when there is a pod.
func (n *Node) run(list Conflist, p *Pod, fn func(*libcni.NetworkConfigList, *libcni.RuntimeConf) error) error {
	var rt *libcni.RuntimeConf
	if p != nil {
		rt = p.runtimeConf()
		if len(p.Labels) > 0 {
			list = list.withLabels(p.Labels)
		}
	}
	b, err := list.JSON()
	if err != nil {
		return err
	}
	c, err := libcni.NetworkConfFromBytes(b)
	if err != nil {
		return fmt.Errorf("netlab: conflist %s: %w", list.Name, err)
	}
	return n.Do(func() error { return fn(c, rt) })
}

func (p *Pod) runtimeConf() *libcni.RuntimeConf {
	rt := &libcni.RuntimeConf{
		ContainerID:    p.ID,
		NetNS:          p.NetNS(),
		IfName:         p.IfName,
		CapabilityArgs: p.Capabilities,
	}
	if p.Name != "" {
		rt.Args = [][2]string{
			{"IgnoreUnknown", "1"},
			{"K8S_POD_NAMESPACE", p.Namespace},
			{"K8S_POD_NAME", p.Name},
			{"K8S_POD_INFRA_CONTAINER_ID", p.ID},
			{"K8S_POD_UID", p.UID},
		}
	}
	return rt
}

// withLabels adds args.cni.labels to every plugin of the list, as the CNI
// conventions say.
func (c Conflist) withLabels(labels map[string]string) Conflist {
	type label struct {
		Key   string `json:"key"`
		Value string `json:"value"`
	}
	var l []label
	for _, k := range slices.Sorted(maps.Keys(labels)) {
		l = append(l, label{k, labels[k]})
	}
	c.Plugins = slices.Clone(c.Plugins)
	for i, p := range c.Plugins {
		c.Plugins[i] = p.With(Plugin{"args": Plugin{"cni": Plugin{"labels": l}}})
	}
	return c
}
