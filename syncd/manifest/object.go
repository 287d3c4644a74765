// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"cmp"
	"fmt"
	"net/netip"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metavalidation "k8s.io/apimachinery/pkg/apis/meta/v1/validation"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/apimachinery/pkg/util/validation/field"

	"github.com/podgate/podgate/bpf/policy"
)

// The kinds of translated objects.
const (
	KindNetworkPolicy = "NetworkPolicy"
	KindPod           = "Pod"
	KindNamespace     = "Namespace"
	KindService       = "Service"
	KindEndpointSlice = "EndpointSlice"
	KindNode          = "Node"
)

// Key names an object the way people do. Namespace is empty for namespaces.
type Key struct {
	Kind, Namespace, Name string
}

// String is "Kind namespace/name".
func (k Key) String() string { return objectName(k.Kind, k.Namespace, k.Name) }

// Compare orders keys by kind, namespace and name.
func (k Key) Compare(o Key) int {
	return cmp.Or(cmp.Compare(k.Kind, o.Kind), cmp.Compare(k.Namespace, o.Namespace), cmp.Compare(k.Name, o.Name))
}

// Object is a translated object. At most one of Policy, Pod, Namespace, Service
// and EndpointSlice is set.
type Object struct {
	Key
	// File, Line and Document say where the object was read, counted from 1;
	// they are zero for objects that come from no file.
	File           string
	Line, Document int

	Policy        *policy.Policy
	Pod           *policy.Pod
	Namespace     *policy.Namespace
	Service       *Service
	EndpointSlice *EndpointSlice

	// Node is where a pod runs or will run; empty if not said.
	Node string
	// Workload is what a pod belongs to; zero if it is its own.
	Workload Workload
	// Addresses of a Node, within the cluster.
	Addresses []netip.Addr
	// Ended says that a pod has terminated and will not come back.
	Ended bool
	// Mirror says that a pod goes by a UID that its creator chose: the API
	// server's copy of a static pod.
	Mirror bool
	// Created is when a pod was made; zero if not said.
	Created time.Time
	// Audit puts a namespace's pods in audit mode. A pod has its own flag.
	Audit bool
}

// Translate translates a *NetworkPolicy, *Pod, *Namespace, *Service or
// *EndpointSlice. The error is an [*InvalidError]; the object that comes with
// it is what could be understood of it, and allows nothing that was not meant.
func Translate(obj any) (Object, error) {
	switch obj := obj.(type) {
	case *networkingv1.NetworkPolicy:
		p, err := Policy(obj)
		return Object{Key: Key{KindNetworkPolicy, p.Namespace, p.Name}, Policy: &p}, err
	case *corev1.Pod:
		p, err := Pod(obj)
		return Object{
			Key: Key{KindPod, p.Namespace, p.Name}, Pod: &p,
			Node: obj.Spec.NodeName, Ended: ended(&obj.Status), Mirror: isMirror(obj), Created: obj.CreationTimestamp.Time,
			Workload: WorkloadOf(obj),
		}, err
	case *corev1.Namespace:
		errs := validateMeta(&obj.ObjectMeta, validation.IsDNS1123Label)
		errs = append(errs, metavalidation.ValidateLabels(obj.Labels, field.NewPath("metadata", "labels"))...)
		audit, e := audited(&obj.ObjectMeta)
		ns := Namespace(obj)
		out := Object{Key: Key{KindNamespace, "", ns.Name}, Namespace: &ns, Audit: audit}
		if errs = append(errs, e...); len(errs) > 0 {
			return out, &InvalidError{KindNamespace, "", obj.Name, errs}
		}
		return out, nil
	case *corev1.Service:
		s, err := ServiceOf(obj)
		return Object{Key: Key{KindService, s.Namespace, s.Name}, Service: &s}, err
	case *discoveryv1.EndpointSlice:
		s, err := EndpointSliceOf(obj)
		return Object{Key: Key{KindEndpointSlice, s.Namespace, obj.Name}, EndpointSlice: &s}, err
	}
	return Object{}, fmt.Errorf("%T is nothing that policy needs", obj)
}
