// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package filter

import (
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"

	flowpb "github.com/cilium/cilium/api/v1/flow"
)

// end is one end of a flow: its source or its destination.
type end struct {
	name      string
	endpoint  func(*flowpb.Flow) *flowpb.Endpoint
	service   func(*flowpb.Flow) *flowpb.Service
	names     func(*flowpb.Flow) []string
	ip        func(*flowpb.Flow) string
	port      func(source, destination uint32) uint32
	ips       func(*flowpb.FlowFilter) []string
	pods      func(*flowpb.FlowFilter) []string
	services  func(*flowpb.FlowFilter) []string
	fqdns     func(*flowpb.FlowFilter) []string
	labels    func(*flowpb.FlowFilter) []string
	clusters  func(*flowpb.FlowFilter) []string
	ports     func(*flowpb.FlowFilter) []string
	workloads func(*flowpb.FlowFilter) []*flowpb.Workload
	ids       func(*flowpb.FlowFilter) []uint32
}

func ends() []end {
	return []end{
		{
			name:      "source",
			endpoint:  (*flowpb.Flow).GetSource,
			service:   (*flowpb.Flow).GetSourceService,
			names:     (*flowpb.Flow).GetSourceNames,
			ip:        func(f *flowpb.Flow) string { return f.GetIP().GetSource() },
			port:      func(source, _ uint32) uint32 { return source },
			ips:       (*flowpb.FlowFilter).GetSourceIp,
			pods:      (*flowpb.FlowFilter).GetSourcePod,
			services:  (*flowpb.FlowFilter).GetSourceService,
			fqdns:     (*flowpb.FlowFilter).GetSourceFqdn,
			labels:    (*flowpb.FlowFilter).GetSourceLabel,
			clusters:  (*flowpb.FlowFilter).GetSourceClusterName,
			ports:     (*flowpb.FlowFilter).GetSourcePort,
			workloads: (*flowpb.FlowFilter).GetSourceWorkload,
			ids:       (*flowpb.FlowFilter).GetSourceIdentity,
		},
		{
			name:      "destination",
			endpoint:  (*flowpb.Flow).GetDestination,
			service:   (*flowpb.Flow).GetDestinationService,
			names:     (*flowpb.Flow).GetDestinationNames,
			ip:        func(f *flowpb.Flow) string { return f.GetIP().GetDestination() },
			port:      func(_, destination uint32) uint32 { return destination },
			ips:       (*flowpb.FlowFilter).GetDestinationIp,
			pods:      (*flowpb.FlowFilter).GetDestinationPod,
			services:  (*flowpb.FlowFilter).GetDestinationService,
			fqdns:     (*flowpb.FlowFilter).GetDestinationFqdn,
			labels:    (*flowpb.FlowFilter).GetDestinationLabel,
			clusters:  (*flowpb.FlowFilter).GetDestinationClusterName,
			ports:     (*flowpb.FlowFilter).GetDestinationPort,
			workloads: (*flowpb.FlowFilter).GetDestinationWorkload,
			ids:       (*flowpb.FlowFilter).GetDestinationIdentity,
		},
	}
}

func criteria() []criterion {
	out := []criterion{
		{"uuid", func(f *flowpb.FlowFilter) (Func, error) { return is(f.GetUuid(), (*flowpb.Flow).GetUuid) }},
		{"verdict", func(f *flowpb.FlowFilter) (Func, error) { return is(f.GetVerdict(), (*flowpb.Flow).GetVerdict) }},
		{"traffic_direction", func(f *flowpb.FlowFilter) (Func, error) {
			return is(f.GetTrafficDirection(), (*flowpb.Flow).GetTrafficDirection)
		}},
		{"ip_version", func(f *flowpb.FlowFilter) (Func, error) {
			return is(f.GetIpVersion(), func(f *flowpb.Flow) flowpb.IPVersion { return f.GetIP().GetIpVersion() })
		}},
		{"encrypted", func(f *flowpb.FlowFilter) (Func, error) {
			return is(f.GetEncrypted(), func(f *flowpb.Flow) bool { return f.GetIP().GetEncrypted() })
		}},
		{"trace_id", func(f *flowpb.FlowFilter) (Func, error) {
			return is(f.GetTraceId(), func(f *flowpb.Flow) string { return f.GetTraceContext().GetParent().GetTraceId() })
		}},
		{"ip_trace_id", func(f *flowpb.FlowFilter) (Func, error) {
			return is(f.GetIpTraceId(), func(f *flowpb.Flow) uint64 { return f.GetIpTraceId().GetTraceId() })
		}},
		{"drop_reason_desc", func(f *flowpb.FlowFilter) (Func, error) { return either(f.GetDropReasonDesc(), dropped) }},
		{"event_type", func(f *flowpb.FlowFilter) (Func, error) { return either(f.GetEventType(), ofType) }},
		{"interface", func(f *flowpb.FlowFilter) (Func, error) { return either(f.GetInterface(), at) }},
		{"reply", func(f *flowpb.FlowFilter) (Func, error) { return either(f.GetReply(), reply) }},
		{"tcp_flags", func(f *flowpb.FlowFilter) (Func, error) { return either(f.GetTcpFlags(), hasFlags) }},
		{"protocol", func(f *flowpb.FlowFilter) (Func, error) { return parsed(f.GetProtocol(), parseProtocol, speaks) }},
		{"source_ip_xlated", func(f *flowpb.FlowFilter) (Func, error) {
			return addresses(f.GetSourceIpXlated(), func(f *flowpb.Flow) string { return f.GetIP().GetSourceXlated() })
		}},
		{"dns_query", func(f *flowpb.FlowFilter) (Func, error) {
			return parsed(f.GetDnsQuery(), regexp.Compile, func(f *flowpb.Flow, query *regexp.Regexp) bool {
				dns := f.GetL7().GetDns()
				return dns != nil && query.MatchString(dns.GetQuery())
			})
		}},
		{"node_name", func(f *flowpb.FlowFilter) (Func, error) { return nodeNames(f.GetNodeName()) }},
		{"node_labels", func(f *flowpb.FlowFilter) (Func, error) {
			return selectors(f.GetNodeLabels(), (*flowpb.Flow).GetNodeLabels)
		}},
		{"http", http},
		{"experimental.cel_expression", func(f *flowpb.FlowFilter) (Func, error) {
			if len(f.GetExperimental().GetCelExpression()) > 0 {
				return nil, ErrUnsupported
			}
			return nil, nil
		}},
	}
	for _, e := range ends() {
		out = append(out, e.criteria()...)
	}
	return out
}

func (e end) criteria() []criterion {
	return []criterion{
		{e.name + "_ip", func(f *flowpb.FlowFilter) (Func, error) { return addresses(e.ips(f), e.ip) }},
		{e.name + "_pod", func(f *flowpb.FlowFilter) (Func, error) {
			return parsed(e.pods(f), parseName, func(f *flowpb.Flow, n name) bool {
				ep := e.endpoint(f)
				return n.matches(ep.GetNamespace(), ep.GetPodName())
			})
		}},
		{e.name + "_service", func(f *flowpb.FlowFilter) (Func, error) {
			return parsed(e.services(f), parseName, func(f *flowpb.Flow, n name) bool {
				s := e.service(f)
				return n.matches(s.GetNamespace(), s.GetName())
			})
		}},
		{e.name + "_fqdn", func(f *flowpb.FlowFilter) (Func, error) {
			return parsed(e.fqdns(f), domainPattern, func(f *flowpb.Flow, pattern *regexp.Regexp) bool {
				return slices.ContainsFunc(e.names(f), pattern.MatchString)
			})
		}},
		{e.name + "_label", func(f *flowpb.FlowFilter) (Func, error) {
			return selectors(e.labels(f), func(f *flowpb.Flow) []string { return e.endpoint(f).GetLabels() })
		}},
		{e.name + "_cluster_name", func(f *flowpb.FlowFilter) (Func, error) {
			return parsed(e.clusters(f), notEmpty, func(f *flowpb.Flow, cluster string) bool {
				return e.endpoint(f).GetClusterName() == cluster
			})
		}},
		{e.name + "_port", func(f *flowpb.FlowFilter) (Func, error) {
			return parsed(e.ports(f), parsePort, func(f *flowpb.Flow, port uint32) bool {
				source, destination, ok := Ports(f)
				return ok && e.port(source, destination) == port
			})
		}},
		{e.name + "_workload", func(f *flowpb.FlowFilter) (Func, error) {
			return either(e.workloads(f), func(f *flowpb.Flow, want *flowpb.Workload) bool {
				return slices.ContainsFunc(e.endpoint(f).GetWorkloads(), func(w *flowpb.Workload) bool {
					return (want.GetName() == "" || want.GetName() == w.GetName()) && (want.GetKind() == "" || want.GetKind() == w.GetKind())
				})
			})
		}},
		{e.name + "_identity", func(f *flowpb.FlowFilter) (Func, error) {
			return either(e.ids(f), func(f *flowpb.Flow, id uint32) bool {
				ep := e.endpoint(f)
				return ep != nil && ep.GetIdentity() == id
			})
		}},
	}
}

// Ports of a flow, if its protocol has any.
func Ports(f *flowpb.Flow) (source, destination uint32, ok bool) {
	switch l4 := f.GetL4().GetProtocol().(type) {
	case *flowpb.Layer4_TCP:
		return l4.TCP.GetSourcePort(), l4.TCP.GetDestinationPort(), true
	case *flowpb.Layer4_UDP:
		return l4.UDP.GetSourcePort(), l4.UDP.GetDestinationPort(), true
	case *flowpb.Layer4_SCTP:
		return l4.SCTP.GetSourcePort(), l4.SCTP.GetDestinationPort(), true
	}
	return 0, 0, false
}

func parsePort(text string) (uint32, error) {
	port, err := strconv.ParseUint(text, 10, 16)
	return uint32(port), err
}

func notEmpty(text string) (string, error) {
	if text == "" {
		return "", errors.New("must not be empty")
	}
	return text, nil
}

func dropped(f *flowpb.Flow, reason flowpb.DropReason) bool {
	return f.GetVerdict() == flowpb.Verdict_DROPPED && f.GetDropReasonDesc() == reason
}

func ofType(f *flowpb.Flow, want *flowpb.EventTypeFilter) bool {
	got := f.GetEventType()
	return got != nil && (want.GetType() == 0 || want.GetType() == got.GetType()) &&
		(!want.GetMatchSubType() || want.GetSubType() == got.GetSubType())
}

func at(f *flowpb.Flow, want *flowpb.NetworkInterface) bool {
	got := f.GetInterface()
	return got != nil && (want.GetIndex() == 0 || want.GetIndex() == got.GetIndex()) &&
		(want.GetName() == "" || want.GetName() == got.GetName())
}

// reply takes a dropped packet of which nobody knows for none, as Hubble does
// for the sake of clients that ask so.
func reply(f *flowpb.Flow, want bool) bool {
	if f.GetIsReply() == nil && f.GetVerdict() != flowpb.Verdict_DROPPED {
		return false
	}
	return f.GetIsReply().GetValue() == want
}

// hasFlags tells whether a segment has all the flags that are wanted.
func hasFlags(f *flowpb.Flow, want *flowpb.TCPFlags) bool {
	got := f.GetL4().GetTCP().GetFlags()
	lacks := func(want, got bool) bool { return want && !got }
	return got != nil && !lacks(want.GetFIN(), got.GetFIN()) && !lacks(want.GetSYN(), got.GetSYN()) &&
		!lacks(want.GetRST(), got.GetRST()) && !lacks(want.GetPSH(), got.GetPSH()) && !lacks(want.GetACK(), got.GetACK()) &&
		!lacks(want.GetURG(), got.GetURG()) && !lacks(want.GetECE(), got.GetECE()) && !lacks(want.GetCWR(), got.GetCWR()) &&
		!lacks(want.GetNS(), got.GetNS())
}

func parseProtocol(text string) (string, error) {
	switch p := strings.ToLower(text); p {
	case "icmp", "icmpv4", "icmpv6", "tcp", "udp", "sctp", "vrrp", "igmp", "dns", "http":
		return p, nil
	}
	return "", errors.New("unknown protocol")
}

func speaks(f *flowpb.Flow, protocol string) bool {
	l4, l7 := f.GetL4(), f.GetL7()
	switch protocol {
	case "icmp":
		return l4.GetICMPv4() != nil || l4.GetICMPv6() != nil
	case "icmpv4":
		return l4.GetICMPv4() != nil
	case "icmpv6":
		return l4.GetICMPv6() != nil
	case "tcp":
		return l4.GetTCP() != nil
	case "udp":
		return l4.GetUDP() != nil
	case "sctp":
		return l4.GetSCTP() != nil
	case "vrrp":
		return l4.GetVRRP() != nil
	case "igmp":
		return l4.GetIGMP() != nil
	case "dns":
		return l7.GetDns() != nil
	default:
		return l7.GetHttp() != nil
	}
}

// addresses matches an address by itself, as text, or by a prefix.
func addresses(texts []string, get func(*flowpb.Flow) string) (Func, error) {
	return parsed(texts, parsePrefix, func(f *flowpb.Flow, p netip.Prefix) bool {
		addr, err := netip.ParseAddr(get(f))
		return err == nil && p.Contains(addr)
	})
}

func parsePrefix(text string) (netip.Prefix, error) {
	if strings.Contains(text, "/") {
		return netip.ParsePrefix(text)
	}
	addr, err := netip.ParseAddr(text)
	if err != nil {
		return netip.Prefix{}, err
	}
	return netip.PrefixFrom(addr, addr.BitLen()), nil
}

// eventAccessLog is the type of events that are about requests, see Cilium's
// pkg/monitor/api.
const eventAccessLog = 129

// httpStatus is a status code of HTTP, or what several begin with and a plus.
const httpStatus = `^[1-5](?:[0-9]{2}|[0-9]?\+)$`

// http matches nothing: there are no requests in what the kernel sees of a
// flow. What Hubble would refuse is an error all the same.
func http(f *flowpb.FlowFilter) (Func, error) {
	if len(f.GetHttpStatusCode())+len(f.GetHttpMethod())+len(f.GetHttpPath())+len(f.GetHttpUrl())+len(f.GetHttpHeader()) == 0 {
		return nil, nil
	}
	requests := func(t *flowpb.EventTypeFilter) bool { return t.GetType() == eventAccessLog }
	if types := f.GetEventType(); len(types) > 0 && !slices.ContainsFunc(types, requests) {
		return nil, errors.New("event types other than l7 have no requests")
	}
	for _, expression := range slices.Concat(f.GetHttpPath(), f.GetHttpUrl()) {
		if _, err := regexp.Compile(expression); err != nil {
			return nil, err
		}
	}
	status, err := regexp.Compile(httpStatus)
	if err != nil {
		return nil, err
	}
	for _, code := range f.GetHttpStatusCode() {
		if !status.MatchString(code) {
			return nil, fmt.Errorf("status code %q", code)
		}
	}
	return func(*flowpb.Flow) bool { return false }, nil
}
