// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/podgate/podgate/bpf/flow"
	"github.com/podgate/podgate/bpf/policy"
)

// flowFilter chooses flows. All that is set must match; of several values of
// one kind any.
type flowFilter struct {
	pods, peers, verdicts, directions, protocols []string
	ports                                        []uint
	prefixes                                     []netip.Prefix
}

func verdicts() []string {
	return []string{flow.Allowed.String(), flow.Denied.String(), flow.Audited.String()}
}

func directions() []string { return []string{policy.Ingress.String(), policy.Egress.String()} }

func (f *flowFilter) register(a *app, cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.StringSliceVar(&f.pods, "pod", nil, "pod the flow was judged at (namespace/name)")
	flags.StringSliceVar(&f.peers, "peer", nil, "other end: address, CIDR or pod")
	flags.StringSliceVar(&f.verdicts, "verdict", nil, strings.Join(verdicts(), ", "))
	flags.StringSliceVar(&f.directions, "direction", nil, strings.Join(directions(), ", "))
	flags.StringSliceVar(&f.protocols, "protocol", nil, "TCP, UDP, SCTP, ICMP, ICMPv6, ARP or a number")
	flags.UintSliceVar(&f.ports, "port", nil, "port of either end")
	complete(cmd, "verdict", verdicts()...)
	complete(cmd, "direction", directions()...)
	complete(cmd, "protocol", "TCP", "UDP", "SCTP", "ICMP", "ICMPv6")
	for _, name := range []string{"pod", "peer"} {
		if err := cmd.RegisterFlagCompletionFunc(name, a.completeEndpoints); err != nil {
			panic(err) // a flag that does not exist
		}
	}
}

// parse checks the values and names the one that is wrong.
func (f *flowFilter) parse() error {
	for _, c := range []struct {
		flag    string
		got     []string
		allowed []string
	}{{"verdict", f.verdicts, verdicts()}, {"direction", f.directions, directions()}} {
		for _, v := range c.got {
			if !slices.Contains(c.allowed, v) {
				return fmt.Errorf("--%s %q is not one of %s", c.flag, v, strings.Join(c.allowed, ", "))
			}
		}
	}
	for _, p := range f.ports {
		if p == 0 || p > 65535 {
			return fmt.Errorf("--port %d is not between 1 and 65535", p)
		}
	}
	var pods []string
	for _, p := range f.peers {
		if addr, err := netip.ParseAddr(p); err == nil {
			f.prefixes = append(f.prefixes, netip.PrefixFrom(addr, addr.BitLen()))
			continue
		}
		if prefix, err := netip.ParsePrefix(p); err == nil {
			f.prefixes = append(f.prefixes, prefix.Masked())
			continue
		}
		if _, err := podOf(p); err != nil {
			return fmt.Errorf("--peer %q is no address, CIDR or pod", p)
		}
		pods = append(pods, p)
	}
	f.peers = pods
	return nil
}

// podOf completes the name of a pod with its namespace.
func podOf(text string) (string, error) {
	switch namespace, name, ok := strings.Cut(text, "/"); {
	case text == "" || ok && (namespace == "" || name == "" || strings.Contains(name, "/")):
		return "", fmt.Errorf("%q is not like namespace/name", text)
	case ok:
		return text, nil
	default:
		return "default/" + text, nil
	}
}

func (f *flowFilter) matches(r *flowReport) bool {
	return anyOf(f.verdicts, func(v string) bool { return v == r.Verdict }) &&
		anyOf(f.directions, func(d string) bool { return d == r.Direction }) &&
		anyOf(f.protocols, func(p string) bool { return strings.EqualFold(p, r.Protocol) }) &&
		anyOf(f.ports, func(p uint) bool { return p == uint(r.LocalPort) || p == uint(r.PeerPort) }) &&
		anyOf(f.pods, func(p string) bool { return isPod(p, r.Pod) || strings.HasPrefix(r.Attachment, p) }) &&
		f.matchesPeer(r)
}

func (f *flowFilter) matchesPeer(r *flowReport) bool {
	if len(f.peers)+len(f.prefixes) == 0 {
		return true
	}
	return slices.ContainsFunc(f.peers, func(p string) bool { return isPod(p, r.Peer) }) ||
		slices.ContainsFunc(f.prefixes, func(p netip.Prefix) bool {
			return p.Contains(r.PeerAddress) || p.Contains(r.Frontend.Addr()) || p.Contains(r.Backend.Addr())
		})
}

func isPod(text, pod string) bool {
	name, err := podOf(text)
	return err == nil && name == pod
}

// anyOf is true for an empty list, as a filter that is not set.
func anyOf[T any](list []T, match func(T) bool) bool {
	return len(list) == 0 || slices.ContainsFunc(list, match)
}

// protocolName is the name of a protocol, or its number.
func protocolName(p policy.Protocol) string {
	switch p {
	case policy.TCP:
		return "TCP"
	case policy.UDP:
		return "UDP"
	case policy.SCTP:
		return "SCTP"
	case policy.ICMP:
		return "ICMP"
	case policy.ICMPv6:
		return "ICMPv6"
	default:
		return strconv.Itoa(int(p))
	}
}

// EtherTypes (IEEE 802 numbers).
const (
	etherIPv4 = 0x0800
	etherARP  = 0x0806
	etherIPv6 = 0x86dd
)

func etherName(t uint16) string {
	if t == etherARP {
		return "ARP"
	}
	return fmt.Sprintf("ethertype 0x%04x", t)
}

// Flags of a TCP header (RFC 9293 3.1) that matter here.
const (
	tcpFIN = 0x01
	tcpSYN = 0x02
	tcpRST = 0x04
	tcpACK = 0x10
)

// tcpFlags names them.
func tcpFlags(flags uint8) string {
	var out []string
	for _, f := range []struct {
		bit  uint8
		name string
	}{{tcpSYN, "SYN"}, {tcpACK, "ACK"}, {tcpFIN, "FIN"}, {tcpRST, "RST"}} {
		if flags&f.bit != 0 {
			out = append(out, f.name)
		}
	}
	return strings.Join(out, ",")
}
