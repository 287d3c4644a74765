// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package cases

import (
	"fmt"
	"reflect"
	"slices"
	"strings"

	"github.com/mattfenwick/cyclonus/pkg/generator"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Cyclonus is all cases that cyclonus generates, on the cluster it makes:
// namespaces x, y, z with pods a, b, c that serve ports 80 and 81. The blocks of
// the first are around the IPv4 address of pod z/c; ipv6 is the cases that have
// such blocks, around its IPv6 address.
func Cyclonus() (ipv4, ipv6 []Case, err error) {
	start := cyclonusCluster()
	target := start.pod("z", "c").Status.PodIPs
	if ipv4, err = start.cyclonus(target[0].IP); err != nil {
		return nil, nil, err
	}
	if ipv6, err = start.cyclonus(target[1].IP); err != nil {
		return nil, nil, err
	}
	for i := range ipv6 {
		if reflect.DeepEqual(ipv4[i], ipv6[i]) {
			ipv6[i].Steps = nil
		}
	}
	ipv6 = slices.DeleteFunc(ipv6, func(c Case) bool { return c.Steps == nil })
	return ipv4, ipv6, nil
}

func (c Cluster) cyclonus(target string) ([]Case, error) {
	var cases []Case
	all := generator.NewTestCaseGenerator(true, target, []string{"x", "y", "z"}, nil, nil).GenerateAllTestCases()
	for i, tc := range all {
		next := Case{Name: fmt.Sprintf("%03d %s", i, tc.Description)}
		cluster := c
		for _, step := range tc.Steps {
			for _, action := range step.Actions {
				var err error
				if cluster, err = cluster.act(action); err != nil {
					return nil, fmt.Errorf("case %q: %w", next.Name, err)
				}
			}
			next.Steps = append(next.Steps, cluster)
		}
		cases = append(cases, next)
	}
	return cases, nil
}

func cyclonusCluster() Cluster {
	var c Cluster
	for _, ns := range []string{"x", "y", "z"} {
		c = c.addNamespace(ns, map[string]string{"ns": ns})
		for _, name := range []string{"a", "b", "c"} {
			c = c.addPod(ns, name, map[string]string{"pod": name})
		}
	}
	return c
}

// act makes what an action of cyclonus makes of the cluster.
func (c Cluster) act(a *generator.Action) (Cluster, error) {
	switch {
	case a.CreatePolicy != nil:
		c.Policies = append(slices.Clone(c.Policies), a.CreatePolicy.Policy)
	case a.UpdatePolicy != nil:
		p := a.UpdatePolicy.Policy
		c = c.deletePolicy(p.Namespace, p.Name)
		c.Policies = append(c.Policies, p)
	case a.DeletePolicy != nil:
		c = c.deletePolicy(a.DeletePolicy.Namespace, a.DeletePolicy.Name)
	case a.CreateNamespace != nil:
		c = c.addNamespace(a.CreateNamespace.Namespace, a.CreateNamespace.Labels)
	case a.SetNamespaceLabels != nil:
		c = c.deleteNamespace(a.SetNamespaceLabels.Namespace)
		c = c.addNamespace(a.SetNamespaceLabels.Namespace, a.SetNamespaceLabels.Labels)
	case a.DeleteNamespace != nil:
		c = c.deleteNamespace(a.DeleteNamespace.Namespace)
		c.Pods = slices.DeleteFunc(slices.Clone(c.Pods), func(p *corev1.Pod) bool { return p.Namespace == a.DeleteNamespace.Namespace })
	case a.CreatePod != nil:
		c = c.addPod(a.CreatePod.Namespace, a.CreatePod.Pod, a.CreatePod.Labels)
	case a.SetPodLabels != nil:
		pod := c.pod(a.SetPodLabels.Namespace, a.SetPodLabels.Pod).DeepCopy()
		pod.Labels = a.SetPodLabels.Labels
		c = c.deletePod(pod.Namespace, pod.Name)
		c.Pods = append(c.Pods, pod)
	case a.DeletePod != nil:
		c = c.deletePod(a.DeletePod.Namespace, a.DeletePod.Pod)
	case a.ReadNetworkPolicies != nil:
		// It reads what is there already.
	default:
		return c, fmt.Errorf("unknown action %+v", a)
	}
	return c, nil
}

func (c Cluster) addNamespace(name string, labels map[string]string) Cluster {
	all := map[string]string{corev1.LabelMetadataName: name}
	for k, v := range labels {
		all[k] = v
	}
	c.Namespaces = append(slices.Clone(c.Namespaces), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: all}})
	return c
}

func (c Cluster) deleteNamespace(name string) Cluster {
	c.Namespaces = slices.DeleteFunc(slices.Clone(c.Namespaces), func(ns *corev1.Namespace) bool { return ns.Name == name })
	return c
}

func (c Cluster) deletePolicy(namespace, name string) Cluster {
	c.Policies = slices.DeleteFunc(slices.Clone(c.Policies), func(p *networkingv1.NetworkPolicy) bool {
		return p.Namespace == namespace && p.Name == name
	})
	return c
}

func (c Cluster) pod(namespace, name string) *corev1.Pod {
	for _, p := range c.Pods {
		if p.Namespace == namespace && p.Name == name {
			return p
		}
	}
	panic(fmt.Sprintf("no pod %s/%s", namespace, name))
}

func (c Cluster) deletePod(namespace, name string) Cluster {
	c.Pods = slices.DeleteFunc(slices.Clone(c.Pods), func(p *corev1.Pod) bool {
		return p.Namespace == namespace && p.Name == name
	})
	return c
}

// addPod adds a pod with the containers and port names of cyclonus, and an
// address of each family.
func (c Cluster) addPod(namespace, name string, labels map[string]string) Cluster {
	n := 2
	for c.PodAt(podAddress(n)) != nil {
		n++
	}
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, Labels: labels},
		Status: corev1.PodStatus{PodIPs: []corev1.PodIP{
			{IP: podAddress(n).String()},
			{IP: fmt.Sprintf("fd00:10:244::%x", n)},
		}},
	}
	for _, port := range []int32{80, 81} {
		for _, proto := range Protocols {
			pod.Spec.Containers = append(pod.Spec.Containers, corev1.Container{
				Name: fmt.Sprintf("cont-%d-%s", port, strings.ToLower(string(proto))),
				Ports: []corev1.ContainerPort{{
					Name: fmt.Sprintf("serve-%d-%s", port, strings.ToLower(string(proto))), ContainerPort: port, Protocol: proto,
				}},
			})
		}
	}
	c.Pods = append(slices.Clone(c.Pods), pod)
	return c
}
