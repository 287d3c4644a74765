// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"fmt"
	"net/netip"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/utils/ptr"
)

// The paths of what changes.
const (
	podsPath       = "/api/v1/pods"
	namespacesPath = "/api/v1/namespaces"
	servicesPath   = "/api/v1/services"
	nodesPath      = "/api/v1/nodes"
	slicesPath     = "/apis/discovery.k8s.io/v1/endpointslices"
	policiesPath   = "/apis/networking.k8s.io/v1/networkpolicies"
)

// started is when everything was made that there is at first.
var started = metav1.NewTime(time.Now().Truncate(time.Second))

// fieldsOf is about as long as what a Deployment's pod has for managedFields.
var fieldsOf = `{"f:metadata":{"f:generateName":{},"f:labels":{".":{},"f:app":{},"f:pod-template-hash":{}},"f:ownerReferences":{".":{},"k:{\"uid\":\"c9f0\"}":{}}},"f:spec":{"f:containers":{"k:{\"name\":\"app\"}":{".":{},` +
	strings.Repeat(`"f:env":{".":{},"k:{\"name\":\"SETTING\"}":{".":{},"f:name":{},"f:value":{}}},`, 8) + `"f:image":{},"f:imagePullPolicy":{},"f:name":{},"f:ports":{},"f:resources":{},"f:terminationMessagePath":{}}},"f:dnsPolicy":{},"f:restartPolicy":{}}}`

func podOf(p *pod) *corev1.Pod {
	app := p.app
	container := func(name string) corev1.Container {
		c := corev1.Container{
			Name: name, Image: "registry.example.com/" + app.namespace.name + "/" + name + ":v1.2.3@sha256:" + strings.Repeat("0123456789abcdef", 4),
			Resources: corev1.ResourceRequirements{
				Requests: corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("100m"), corev1.ResourceMemory: resource.MustParse("128Mi")},
				Limits:   corev1.ResourceList{corev1.ResourceMemory: resource.MustParse("256Mi")},
			},
			Ports:        []corev1.ContainerPort{{Name: "http", ContainerPort: 8080, Protocol: corev1.ProtocolTCP}},
			VolumeMounts: []corev1.VolumeMount{{Name: "kube-api-access", ReadOnly: true, MountPath: "/var/run/secrets/kubernetes.io/serviceaccount"}},
			LivenessProbe: &corev1.Probe{
				ProbeHandler: corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Path: "/healthz", Port: intstr.FromString("http")}},
			},
			TerminationMessagePath: "/dev/termination-log", ImagePullPolicy: corev1.PullIfNotPresent,
		}
		for i := range 12 {
			c.Env = append(c.Env, corev1.EnvVar{Name: fmt.Sprintf("SETTING_%d", i), Value: "of some length, as there are"})
		}
		return c
	}
	o := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: app.namespace.name, Name: p.name(), UID: types.UID(p.uid()), CreationTimestamp: started,
			GenerateName: app.name + "-5d4f8c7b9-", Labels: p.labels(),
			Annotations: map[string]string{"prometheus.io/scrape": "true", "prometheus.io/port": "8080"},
			OwnerReferences: []metav1.OwnerReference{{
				APIVersion: "apps/v1", Kind: "ReplicaSet", Name: app.name + "-5d4f8c7b9", UID: types.UID("rs-" + app.name), Controller: ptr.To(true),
			}},
			ManagedFields: []metav1.ManagedFieldsEntry{
				{Manager: "kube-controller-manager", Operation: metav1.ManagedFieldsOperationUpdate, APIVersion: "v1", Time: &started, FieldsType: "FieldsV1", FieldsV1: metav1.NewFieldsV1(fieldsOf)},
				{Manager: "kubelet", Operation: metav1.ManagedFieldsOperationUpdate, APIVersion: "v1", Time: &started, FieldsType: "FieldsV1", Subresource: "status", FieldsV1: metav1.NewFieldsV1(fieldsOf)},
			},
		},
		Spec: corev1.PodSpec{
			Containers: []corev1.Container{container("app")}, ServiceAccountName: "default", RestartPolicy: corev1.RestartPolicyAlways,
			DNSPolicy: corev1.DNSClusterFirst, SchedulerName: corev1.DefaultSchedulerName,
			Tolerations: []corev1.Toleration{
				{Key: corev1.TaintNodeNotReady, Operator: corev1.TolerationOpExists, Effect: corev1.TaintEffectNoExecute, TolerationSeconds: ptr.To[int64](300)},
				{Key: corev1.TaintNodeUnreachable, Operator: corev1.TolerationOpExists, Effect: corev1.TaintEffectNoExecute, TolerationSeconds: ptr.To[int64](300)},
			},
			Volumes: []corev1.Volume{{Name: "kube-api-access", VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{}}}},
		},
		Status: corev1.PodStatus{Phase: corev1.PodPending, QOSClass: corev1.PodQOSBurstable},
	}
	if p.node >= 0 {
		o.Spec.NodeName = nodeName(p.node)
	}
	if p.address.IsValid() {
		o.Status.Phase = corev1.PodRunning
		o.Status.PodIP, o.Status.PodIPs = p.address.String(), []corev1.PodIP{{IP: p.address.String()}}
		o.Status.HostIP, o.Status.StartTime = "192.0.2.1", &started
		for _, c := range []corev1.PodConditionType{corev1.PodScheduled, corev1.PodInitialized, corev1.ContainersReady, corev1.PodReady} {
			o.Status.Conditions = append(o.Status.Conditions, corev1.PodCondition{Type: c, Status: corev1.ConditionTrue, LastTransitionTime: started})
		}
		o.Status.ContainerStatuses = []corev1.ContainerStatus{{
			Name: "app", Ready: p.ready, Started: ptr.To(true), Image: o.Spec.Containers[0].Image, ImageID: o.Spec.Containers[0].Image,
			ContainerID: "containerd://" + strings.Repeat("0123456789abcdef", 4),
			State:       corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: started}},
		}}
	}
	if p.going {
		o.DeletionTimestamp, o.DeletionGracePeriodSeconds = ptr.To(metav1.Now()), ptr.To[int64](30)
	}
	return o
}

func nodeName(n int) string { return fmt.Sprintf("node-%d", n) }

func nodeOf(n int) *corev1.Node {
	return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: nodeName(n), UID: types.UID(nodeName(n))}}
}

func namespaceOf(n *namespace) *corev1.Namespace {
	return &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{
		Name: n.name, UID: types.UID(n.name), CreationTimestamp: started,
		Labels: map[string]string{corev1.LabelMetadataName: n.name, "team": n.team},
	}}
}

func serviceOf(a *app) *corev1.Service {
	return &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: a.namespace.name, Name: a.name, UID: types.UID(a.namespace.name + a.name), CreationTimestamp: started},
		Spec: corev1.ServiceSpec{
			Type: corev1.ServiceTypeClusterIP, ClusterIP: a.vip.String(), ClusterIPs: []string{a.vip.String()},
			IPFamilies: []corev1.IPFamily{corev1.IPv4Protocol}, Selector: map[string]string{"app": a.name},
			Ports: []corev1.ServicePort{{Name: "http", Protocol: corev1.ProtocolTCP, Port: 80, TargetPort: intstr.FromString("http")}},
		},
	}
}

func sliceOf(a *app) *discoveryv1.EndpointSlice {
	s := &discoveryv1.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: a.namespace.name, Name: a.name + "-x7k2p", UID: types.UID("slice-" + a.namespace.name + a.name), CreationTimestamp: started,
			Labels: map[string]string{discoveryv1.LabelServiceName: a.name, discoveryv1.LabelManagedBy: "endpointslice-controller.k8s.io"},
		},
		AddressType: discoveryv1.AddressTypeIPv4,
		Ports:       []discoveryv1.EndpointPort{{Name: ptr.To("http"), Protocol: ptr.To(corev1.ProtocolTCP), Port: ptr.To[int32](8080)}},
	}
	for p := range a.pods {
		if p.address.IsValid() {
			s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{
				Addresses:  []string{p.address.String()},
				Conditions: discoveryv1.EndpointConditions{Ready: ptr.To(!p.going), Serving: ptr.To(true), Terminating: ptr.To(p.going)},
				NodeName:   ptr.To(nodeName(p.node)), Zone: ptr.To("zone-a"),
				TargetRef: &corev1.ObjectReference{Kind: "Pod", Namespace: a.namespace.name, Name: p.name(), UID: types.UID(p.uid())},
			})
		}
	}
	return s
}

// policyOf is the policy of a number of a namespace: a default deny, and what
// people write beside it.
func policyOf(n *namespace, i int) *networkingv1.NetworkPolicy {
	tcp := func(port int32) []networkingv1.NetworkPolicyPort {
		return []networkingv1.NetworkPolicyPort{{Protocol: ptr.To(corev1.ProtocolTCP), Port: ptr.To(intstr.FromInt32(port))}}
	}
	pods := func(app int) *metav1.LabelSelector {
		return &metav1.LabelSelector{MatchLabels: map[string]string{"app": appName(app)}}
	}
	p := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{
		Namespace: n.name, Name: fmt.Sprintf("policy-%d", i), UID: types.UID(fmt.Sprintf("policy-%s-%d", n.name, i)), CreationTimestamp: started,
	}}
	in, out := networkingv1.PolicyTypeIngress, networkingv1.PolicyTypeEgress
	switch i % policiesPerNamespace {
	case 0: // nothing gets in that is not allowed
		p.Spec.PolicyTypes = []networkingv1.PolicyType{in}
	case 1: // one app to another
		p.Spec.PolicyTypes = []networkingv1.PolicyType{in}
		p.Spec.PodSelector = *pods(0)
		p.Spec.Ingress = []networkingv1.NetworkPolicyIngressRule{{From: []networkingv1.NetworkPolicyPeer{{PodSelector: pods(1)}}, Ports: tcp(8080)}}
	case 2: // one app of another team
		p.Spec.PolicyTypes = []networkingv1.PolicyType{in}
		p.Spec.PodSelector = *pods(1)
		p.Spec.Ingress = []networkingv1.NetworkPolicyIngressRule{{From: []networkingv1.NetworkPolicyPeer{{
			NamespaceSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"team": n.friend}}, PodSelector: pods(2),
		}}, Ports: tcp(8080)}}
	case 3: // monitoring
		p.Spec.PolicyTypes = []networkingv1.PolicyType{in}
		p.Spec.Ingress = []networkingv1.NetworkPolicyIngressRule{{From: []networkingv1.NetworkPolicyPeer{{
			NamespaceSelector: &metav1.LabelSelector{MatchLabels: map[string]string{corev1.LabelMetadataName: "ns-0"}},
		}}, Ports: tcp(9090)}}
	case 4: // out to names, and to a network but for a part of it
		p.Spec.PolicyTypes = []networkingv1.PolicyType{out}
		p.Spec.PodSelector = *pods(3)
		p.Spec.Egress = []networkingv1.NetworkPolicyEgressRule{
			{To: []networkingv1.NetworkPolicyPeer{{
				NamespaceSelector: &metav1.LabelSelector{MatchLabels: map[string]string{corev1.LabelMetadataName: "ns-1"}}, PodSelector: pods(0),
			}}, Ports: []networkingv1.NetworkPolicyPort{{Protocol: ptr.To(corev1.ProtocolUDP), Port: ptr.To(intstr.FromInt32(53))}}},
			{To: []networkingv1.NetworkPolicyPeer{{IPBlock: &networkingv1.IPBlock{
				CIDR: "198.18.0.0/15", Except: []string{netip.PrefixFrom(netip.AddrFrom4([4]byte{198, 19, byte(n.number >> 4), byte(n.number << 4)}), 28).String()},
			}}}, Ports: tcp(443)},
		}
	}
	return p
}
