// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package reach

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/podgate/podgate/bpf/policy"
)

// Party is one end of a question.
type Party struct {
	// Name is namespace/name of a pod, or the address.
	Name string
	// Pod is nil for an address that no known pod has.
	Pod *policy.Pod
	// Addresses it speaks from, of either family.
	Addresses []netip.Addr
}

// Party finds a pod by namespace/name (or name, in namespace default), or takes
// an address; an address of a known pod is that pod. It returns [ErrUnknown]
// for anything else.
func (e *Evaluator) Party(text string) (Party, error) {
	if a, err := netip.ParseAddr(text); err == nil {
		if a = a.Unmap(); a.Zone() != "" {
			return Party{}, fmt.Errorf("%s: leave out the zone", text)
		}
		return e.partyAt(a), nil
	}
	pods := e.inventory.Pods()
	namespace, name, ok := strings.Cut(text, "/")
	if !ok {
		namespace, name = "default", text
	}
	for i := range pods {
		if pods[i].Namespace == namespace && pods[i].Name == name {
			if len(pods[i].Addresses) == 0 {
				return Party{}, fmt.Errorf("pod %s/%s has no address", namespace, name)
			}
			return party(&pods[i]), nil
		}
	}
	return Party{}, fmt.Errorf("%w: %s/%s; %s", ErrUnknown, namespace, name, known(pods))
}

// partyAt is the pod that has an address, or the address.
func (e *Evaluator) partyAt(a netip.Addr) Party {
	if p, ok := e.pods[a]; ok {
		return Party{Name: podName(&p), Pod: &p, Addresses: []netip.Addr{a}}
	}
	return Party{Name: a.String(), Addresses: []netip.Addr{a}}
}

// Pods are all pods that have an address and are not on the host network.
func (e *Evaluator) Pods() []Party {
	var out []Party
	pods := e.inventory.Pods()
	for i := range pods {
		if !pods[i].HostNetwork && len(pods[i].Addresses) > 0 {
			out = append(out, party(&pods[i]))
		}
	}
	return out
}

// Assumed reports whether an address was made up for a pod that has none.
func (e *Evaluator) Assumed(a netip.Addr) bool {
	_, ok := e.assumed[a]
	return ok
}

func party(p *policy.Pod) Party {
	return Party{Name: podName(p), Pod: p, Addresses: p.Addresses}
}

func podName(p *policy.Pod) string { return p.Namespace + "/" + p.Name }

// known lists some pods, to help who asked for another.
func known(pods []policy.Pod) string {
	const some = 8
	if len(pods) == 0 {
		return "no pod is known"
	}
	var names []string
	for i := range pods[:min(some, len(pods))] {
		names = append(names, podName(&pods[i]))
	}
	if len(pods) > some {
		names = append(names, fmt.Sprintf("and %d more", len(pods)-some))
	}
	return "known are " + strings.Join(names, ", ")
}

// address is the first of a family.
func (p Party) address(v4 bool) (netip.Addr, bool) {
	for _, a := range p.Addresses {
		if a.Is4() == v4 {
			return a, true
		}
	}
	return netip.Addr{}, false
}

func (p Party) addresses() string {
	var out []string
	for _, a := range p.Addresses {
		out = append(out, a.String())
	}
	return strings.Join(out, ", ")
}

// Port is a protocol, with a destination port if it has ports. ICMP stands for
// an echo request of either family.
type Port struct {
	Protocol policy.Protocol
	Port     uint16
}

// ParsePort reads 80/TCP, TCP/80, 80 (TCP) and ICMP.
func ParsePort(text string) (Port, error) {
	if strings.EqualFold(text, "icmp") {
		return Port{Protocol: policy.ICMP}, nil
	}
	number, name, ok := strings.Cut(text, "/")
	if !ok {
		name = "TCP"
	} else if _, err := strconv.Atoi(name); err == nil {
		number, name = name, number
	}
	protocols := map[string]policy.Protocol{"TCP": policy.TCP, "UDP": policy.UDP, "SCTP": policy.SCTP}
	proto, known := protocols[strings.ToUpper(name)]
	n, err := strconv.ParseUint(number, 10, 16)
	if !known || err != nil || n == 0 {
		return Port{}, fmt.Errorf("port %q is not like 80/TCP, 53/UDP, 5060/SCTP or ICMP", text)
	}
	return Port{Protocol: proto, Port: uint16(n)}, nil
}

// String is like 80/TCP.
func (p Port) String() string {
	if p.Port == 0 {
		return p.protocolName()
	}
	return fmt.Sprintf("%d/%s", p.Port, p.protocolName())
}

func (p Port) protocolName() string {
	switch p.Protocol {
	case policy.UDP:
		return "UDP"
	case policy.SCTP:
		return "SCTP"
	case policy.ICMP:
		return "ICMP"
	default:
		return "TCP"
	}
}

// protocol is the one that peers of the address's family use.
func (p Port) protocol(peer netip.Addr) policy.Protocol {
	if p.Protocol == policy.ICMP && peer.Is6() {
		return policy.ICMPv6
	}
	return p.Protocol
}

// coordinate is what the compiler calls a port: for an echo request its type
// (RFC 792, RFC 4443) in the upper byte.
func (p Port) coordinate(peer netip.Addr) uint16 {
	switch p.protocol(peer) {
	case policy.ICMP:
		return 8 << 8
	case policy.ICMPv6:
		return 128 << 8
	default:
		return p.Port
	}
}
