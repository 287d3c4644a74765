// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"net/netip"
	"slices"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Workload is what makes pods and their replacements, as people name it.
type Workload struct {
	Kind, Name string
}

// WorkloadOf is the workload of a pod, as its metadata tell: the controller, but
// a Deployment for the ReplicaSet that it made, and a CronJob for its Job. Pods
// that nothing controls have none.
func WorkloadOf(pod *corev1.Pod) Workload {
	owner := metav1.GetControllerOf(pod)
	if owner == nil {
		return Workload{}
	}
	switch owner.Kind {
	case "ReplicaSet":
		// The Deployment's controller labels the pods with what it ends the
		// ReplicaSet's name in.
		hash := pod.Labels[appsv1.DefaultDeploymentUniqueLabelKey]
		if name, ok := strings.CutSuffix(owner.Name, "-"+hash); ok && hash != "" {
			return Workload{"Deployment", name}
		}
	case "Job":
		// The CronJob's controller ends the Job's name in the minutes since 1970,
		// and leaves no other trace in the pod.
		const digits = 8
		i := strings.LastIndexByte(owner.Name, '-')
		if i > 0 && len(owner.Name)-i > digits && strings.Trim(owner.Name[i+1:], "0123456789") == "" {
			return Workload{"CronJob", owner.Name[:i]}
		}
	}
	return Workload{owner.Kind, owner.Name}
}

// NodeOf translates a node.
func NodeOf(node *corev1.Node) Object {
	out := Object{Key: Key{Kind: KindNode, Name: node.Name}}
	for _, kind := range []corev1.NodeAddressType{corev1.NodeInternalIP, corev1.NodeExternalIP} {
		for _, a := range node.Status.Addresses {
			if ip, err := netip.ParseAddr(a.Address); err == nil && a.Type == kind && !slices.Contains(out.Addresses, ip) {
				out.Addresses = append(out.Addresses, ip)
			}
		}
	}
	return out
}
