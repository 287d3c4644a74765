// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package cases

import (
	"errors"
	"fmt"
	"iter"
	"math/rand/v2"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/podgate/podgate/bpf/policy"
	"github.com/podgate/podgate/syncd/manifest"
)

// Case is a cluster that changes step by step.
type Case struct {
	Name  string
	Steps []Cluster
}

// Cluster is the objects of a cluster at one moment. Clusters share objects, so
// these are never changed.
type Cluster struct {
	Namespaces []*corev1.Namespace
	Pods       []*corev1.Pod
	Policies   []*networkingv1.NetworkPolicy
}

// Protocols that policy can name.
var Protocols = []corev1.Protocol{corev1.ProtocolTCP, corev1.ProtocolUDP, corev1.ProtocolSCTP}

// Outside is addresses that no pod has. Some are within the ranges that pods'
// addresses are from.
var Outside = []netip.Addr{
	netip.MustParseAddr("10.244.7.77"),
	netip.MustParseAddr("10.9.8.7"),
	netip.MustParseAddr("203.0.113.1"),
	netip.MustParseAddr("fd00:10:244::777"),
	netip.MustParseAddr("2001:db8::1"),
}

// Question is a packet of a new flow as seen from one pod.
type Question struct {
	Direction policy.Direction
	Subject   *corev1.Pod
	// Local is the subject's address of the peer's family.
	Local, Peer netip.Addr
	Protocol    corev1.Protocol
	// Port of the destination, never 0.
	Port uint16
}

func (q Question) String() string {
	return fmt.Sprintf("%s of %s/%s (%s), peer %s, %s/%d", q.Direction, q.Subject.Namespace, q.Subject.Name, q.Local, q.Peer, q.Protocol, q.Port)
}

// Self says that the pod speaks to itself, which policy never forbids.
func (q Question) Self() bool { return slices.Contains(Addresses(q.Subject), q.Peer) }

// Number is the protocol as packets have it.
func (q Question) Number() policy.Protocol {
	switch q.Protocol {
	case corev1.ProtocolUDP:
		return policy.UDP
	case corev1.ProtocolSCTP:
		return policy.SCTP
	default:
		return policy.TCP
	}
}

// Addresses of a pod.
func Addresses(pod *corev1.Pod) []netip.Addr {
	var out []netip.Addr
	for _, ip := range pod.Status.PodIPs {
		out = append(out, netip.MustParseAddr(ip.IP))
	}
	return out
}

// PodAt is the pod that has an address, nil for none. Pods on the host network
// do not have their node's.
func (c Cluster) PodAt(a netip.Addr) *corev1.Pod {
	for _, p := range c.Pods {
		if !p.Spec.HostNetwork && slices.Contains(Addresses(p), a) {
			return p
		}
	}
	return nil
}

// NamespaceLabels of a namespace of the cluster.
func (c Cluster) NamespaceLabels(name string) map[string]string {
	for _, ns := range c.Namespaces {
		if ns.Name == name {
			return ns.Labels
		}
	}
	return nil
}

// Peers is every address worth asking about.
func (c Cluster) Peers() []netip.Addr {
	peers := slices.Clone(Outside)
	for _, p := range c.Pods {
		peers = append(peers, Addresses(p)...)
	}
	return peers
}

// Ports is every port that policy or pods mention, and its neighbours.
func (c Cluster) Ports() []uint16 {
	ports := []uint16{1, 65535}
	mention := func(n int32) {
		for _, n := range []int32{n - 1, n, n + 1} {
			if n > 0 && n < 1<<16 {
				ports = append(ports, uint16(n))
			}
		}
	}
	for _, p := range c.Pods {
		for _, k := range p.Spec.Containers {
			for _, q := range k.Ports {
				mention(q.ContainerPort)
			}
		}
	}
	for _, p := range c.Policies {
		for _, q := range policyPorts(p) {
			if q.Port != nil && q.Port.Type == intstr.Int {
				mention(q.Port.IntVal)
			}
			if q.EndPort != nil {
				mention(*q.EndPort)
			}
		}
	}
	slices.Sort(ports)
	return slices.Compact(ports)
}

func policyPorts(p *networkingv1.NetworkPolicy) []networkingv1.NetworkPolicyPort {
	var ports []networkingv1.NetworkPolicyPort
	for _, r := range p.Spec.Ingress {
		ports = append(ports, r.Ports...)
	}
	for _, r := range p.Spec.Egress {
		ports = append(ports, r.Ports...)
	}
	return ports
}

// Questions is every question there is: all pods, peers, protocols, ports and
// directions.
func (c Cluster) Questions() iter.Seq[Question] {
	peers, ports := c.Peers(), c.Ports()
	return func(yield func(Question) bool) {
		for _, pod := range c.Pods {
			for _, peer := range peers {
				local, ok := localAddress(pod, peer)
				if !ok {
					continue
				}
				for _, proto := range Protocols {
					for _, port := range ports {
						for _, d := range []policy.Direction{policy.Ingress, policy.Egress} {
							if !yield(Question{d, pod, local, peer, proto, port}) {
								return
							}
						}
					}
				}
			}
		}
	}
}

// Sample is n random questions.
func (c Cluster) Sample(r *rand.Rand, n int) iter.Seq[Question] {
	peers, ports := c.Peers(), c.Ports()
	return func(yield func(Question) bool) {
		for range n {
			pod, peer := c.Pods[r.IntN(len(c.Pods))], peers[r.IntN(len(peers))]
			local, ok := localAddress(pod, peer)
			if !ok {
				continue
			}
			q := Question{policy.Direction(r.IntN(2)), pod, local, peer, Protocols[r.IntN(len(Protocols))], ports[r.IntN(len(ports))]}
			if !yield(q) {
				return
			}
		}
	}
}

// localAddress is the address by which a pod that is subject to policy meets a
// peer.
func localAddress(pod *corev1.Pod, peer netip.Addr) (netip.Addr, bool) {
	for _, a := range Addresses(pod) {
		if a.Is4() == peer.Is4() && !pod.Spec.HostNetwork {
			return a, true
		}
	}
	return netip.Addr{}, false
}

// Key is the key of a pod in the compiler.
func Key(pod *corev1.Pod) policy.PodKey {
	return manifest.PodKey(string(pod.UID), pod.Namespace, pod.Name)
}

// Load brings a compiler from one cluster to the next. All pods are local.
func Load(c *policy.Compiler, from, to Cluster) error {
	var errs error
	for _, ns := range to.Namespaces {
		c.SetNamespace(manifest.Namespace(ns))
	}
	for _, pod := range to.Pods {
		p, err := manifest.Pod(pod)
		p.Local = true
		errs = errors.Join(errs, err, c.SetPod(p))
	}
	uids := map[string]bool{}
	for _, np := range to.Policies {
		p, err := manifest.Policy(np)
		errs = errors.Join(errs, err, c.SetPolicy(p))
		uids[p.UID] = true
	}
	for _, np := range from.Policies {
		p, err := manifest.Policy(np)
		errs = errors.Join(errs, err)
		if !uids[p.UID] {
			c.DeletePolicy(p.UID)
		}
	}
	for _, old := range from.Pods {
		if !slices.ContainsFunc(to.Pods, func(pod *corev1.Pod) bool { return Key(pod) == Key(old) }) {
			c.DeletePod(Key(old))
		}
	}
	for _, old := range from.Namespaces {
		if !slices.ContainsFunc(to.Namespaces, func(ns *corev1.Namespace) bool { return ns.Name == old.Name }) {
			c.DeleteNamespace(old.Name)
		}
	}
	return errs
}
