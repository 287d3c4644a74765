// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package naming

import (
	"hash/fnv"
	"maps"
	"slices"
	"strings"

	"github.com/podgate/podgate/bpf/policy"
	"github.com/podgate/podgate/syncd/manifest"
)

// Party is one end of a flow. It is shared and never changes.
type Party struct {
	// Namespace and Pod are empty for what is no pod. Reserved is the word for
	// what that is: "world", "host" or "remote-node".
	Namespace, Pod, Reserved string
	Workload                 manifest.Workload
	// Labels as Hubble writes them: "k8s:app=web", sorted.
	Labels []string
	// Identity is a number that parties with the same labels share, on all nodes.
	// Those below 256 are reserved; see [World] and the others.
	Identity uint32
	// Endpoint is the number of the pod's endpoint on this node; 0 elsewhere.
	Endpoint uint32
}

// Reserved identities have the numbers that Cilium gives them.
const (
	identityHost       = 1
	identityWorld      = 2
	identityRemoteNode = 6
	identityFirst      = 256
	identityBits       = 24
)

// World is everything that is neither pod nor node.
func World() *Party { return reserved(identityWorld, "world") }

// Host is the node itself.
func Host() *Party { return reserved(identityHost, "host") }

// RemoteNode is another node of the cluster.
func RemoteNode() *Party { return reserved(identityRemoteNode, "remote-node") }

func reserved(id uint32, name string) *Party {
	return &Party{Identity: id, Reserved: name, Labels: []string{"reserved:" + name}}
}

// Labels that Cilium adds to those of a pod.
const (
	sourceKubernetes     = "k8s:"
	labelNamespace       = sourceKubernetes + "io.kubernetes.pod.namespace="
	labelNamespaceLabels = sourceKubernetes + "io.cilium.k8s.namespace.labels."
	labelCluster         = sourceKubernetes + "io.cilium.k8s.policy.cluster="
)

// podParty makes the party of a pod.
func podParty(pod *policy.Pod, workload manifest.Workload, namespace map[string]string, cluster string, endpoint uint32) *Party {
	labels := []string{labelNamespace + pod.Namespace, labelCluster + cluster}
	for _, k := range slices.Sorted(maps.Keys(pod.Labels)) {
		labels = append(labels, sourceKubernetes+k+"="+pod.Labels[k])
	}
	for _, k := range slices.Sorted(maps.Keys(namespace)) {
		labels = append(labels, labelNamespaceLabels+k+"="+namespace[k])
	}
	slices.Sort(labels)
	return &Party{
		Namespace: pod.Namespace, Pod: pod.Name, Workload: workload, Labels: labels, Endpoint: endpoint, Identity: identity(labels),
	}
}

// PodLabels are those that a pod has itself, of labels as Hubble writes them.
func PodLabels(labels []string) map[string]string {
	out := make(map[string]string)
	for _, l := range labels {
		if strings.HasPrefix(l, labelNamespace) || strings.HasPrefix(l, labelNamespaceLabels) || strings.HasPrefix(l, labelCluster) {
			continue
		}
		if text, ok := strings.CutPrefix(l, sourceKubernetes); ok {
			key, value, _ := strings.Cut(text, "=")
			out[key] = value
		}
	}
	return out
}

// identity is a digest of labels outside the reserved numbers.
func identity(labels []string) uint32 {
	h := fnv.New32a()
	for _, l := range labels {
		_, _ = h.Write([]byte(l))
		_, _ = h.Write([]byte{0})
	}
	const size = 1<<identityBits - identityFirst
	return identityFirst + h.Sum32()%size
}
