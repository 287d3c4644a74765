// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package suggest_test

import (
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	flowpb "github.com/cilium/cilium/api/v1/flow"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"
	"sigs.k8s.io/yaml"

	"github.com/podgate/podgate/observe/suggest"
	"github.com/podgate/podgate/syncd/reach"
)

// party is a pod, or an address that is none.
type party struct {
	namespace, name, workload, address string
	labels                             map[string]string
}

// world is who there is. The two pods of web are one workload; bare has no
// labels of its own.
var world = map[string]party{
	"web-1":   {"shop", "web-1", "web", "10.0.0.1", map[string]string{"app": "web", "pod-template-hash": "5d9f"}},
	"web-2":   {"shop", "web-2", "web", "10.0.0.2", map[string]string{"app": "web", "pod-template-hash": "77aa"}},
	"db":      {"shop", "db-0", "db", "10.0.0.3", map[string]string{"app": "db", "statefulset.kubernetes.io/pod-name": "db-0"}},
	"bare":    {"shop", "bare", "", "10.0.0.4", nil},
	"probe":   {"ops", "probe", "probe", "10.0.0.5", map[string]string{"app": "web"}}, // as the shop's
	"dns":     {"kube-system", "dns", "dns", "10.0.0.6", map[string]string{"k8s-app": "kube-dns"}},
	"outside": {"", "", "", "203.0.113.7", nil},
	"further": {"", "", "", "203.0.113.8", nil},
}

func (p party) endpoint() *flowpb.Endpoint {
	if p.name == "" {
		return &flowpb.Endpoint{Labels: []string{"reserved:world"}}
	}
	e := &flowpb.Endpoint{Namespace: p.namespace, PodName: p.name, Labels: []string{
		"k8s:io.kubernetes.pod.namespace=" + p.namespace, "k8s:io.cilium.k8s.policy.cluster=default",
		"k8s:io.cilium.k8s.namespace.labels.team=any",
	}}
	for k, v := range p.labels {
		e.Labels = append(e.Labels, "k8s:"+k+"="+v)
	}
	if p.workload != "" {
		e.Workloads = []*flowpb.Workload{{Kind: "Deployment", Name: p.workload}}
	}
	return e
}

// flows are those of a connection, at each end that is a pod.
func flows(from, to, port string, change ...func(*flowpb.Flow)) (out []*flowpb.Flow) {
	source, destination := world[from], world[to]
	for _, direction := range []flowpb.TrafficDirection{flowpb.TrafficDirection_INGRESS, flowpb.TrafficDirection_EGRESS} {
		local := destination
		if direction == flowpb.TrafficDirection_EGRESS {
			local = source
		}
		if local.name == "" {
			continue
		}
		f := &flowpb.Flow{
			TrafficDirection: direction, Verdict: flowpb.Verdict_AUDIT, Source: source.endpoint(), Destination: destination.endpoint(),
			IP: &flowpb.IP{Source: source.address, Destination: destination.address}, Extensions: details("default", true), L4: layer4(port),
		}
		for _, c := range change {
			c(f)
		}
		out = append(out, f)
	}
	return out
}

func details(reason string, isolated bool) *anypb.Any {
	a, err := anypb.New(&structpb.Struct{Fields: map[string]*structpb.Value{
		"reason": structpb.NewStringValue(reason), "isolated": structpb.NewBoolValue(isolated),
	}})
	if err != nil {
		panic(err)
	}
	return a
}

func layer4(port string) *flowpb.Layer4 {
	var number uint32
	var protocol string
	if n, _ := fmt.Sscanf(port, "%d/%s", &number, &protocol); n != 2 {
		return &flowpb.Layer4{Protocol: &flowpb.Layer4_ICMPv4{ICMPv4: &flowpb.ICMPv4{Type: 8}}}
	}
	switch protocol {
	case "UDP":
		return &flowpb.Layer4{Protocol: &flowpb.Layer4_UDP{UDP: &flowpb.UDP{SourcePort: 40000, DestinationPort: number}}}
	case "SCTP":
		return &flowpb.Layer4{Protocol: &flowpb.Layer4_SCTP{SCTP: &flowpb.SCTP{SourcePort: 40000, DestinationPort: number}}}
	default:
		return &flowpb.Layer4{Protocol: &flowpb.Layer4_TCP{TCP: &flowpb.TCP{
			SourcePort: 40000, DestinationPort: number, Flags: &flowpb.TCPFlags{SYN: true},
		}}}
	}
}

func denied(f *flowpb.Flow) { f.Verdict = flowpb.Verdict_DROPPED }
func allowed(f *flowpb.Flow) {
	f.Verdict, f.Extensions = flowpb.Verdict_FORWARDED, details("policy", false)
}

// seen is a day in the shop.
func seen() []*flowpb.Flow {
	return slices.Concat(
		flows("web-1", "db", "5432/TCP"),
		flows("web-2", "db", "5432/TCP", allowed),
		flows("web-1", "db", "5433/TCP"),
		flows("web-2", "dns", "53/UDP"), flows("web-1", "dns", "53/TCP"), flows("db", "dns", "53/UDP"),
		flows("outside", "web-1", "443/TCP"), flows("probe", "web-2", "443/TCP"), flows("probe", "web-2", "9/SCTP"),
		flows("db", "further", "443/TCP"),
	)
}

func collect(o suggest.Options, all []*flowpb.Flow) *suggest.Collector {
	c := suggest.New(o)
	for _, f := range all {
		c.Add(f)
	}
	return c
}

func text(t *testing.T, c *suggest.Collector) string {
	t.Helper()
	var b strings.Builder
	for _, p := range c.Policies() {
		y, err := yaml.Marshal(&p)
		if err != nil {
			t.Fatal(err)
		}
		b.WriteString("---\n" + string(y))
	}
	return b.String()
}

// What is suggested lets through all that was seen and nothing else, says the
// compiler, and the kernel where there is root.
func TestRoundTrip(t *testing.T) {
	suggested := text(t, collect(suggest.Options{}, seen()))
	e := evaluator(t, suggested)
	want := map[string]bool{}
	for _, connection := range []string{
		"web db 5432/TCP", "web db 5433/TCP", "web dns 53/UDP", "web dns 53/TCP", "db dns 53/UDP",
		"outside web 443/TCP", "probe web 443/TCP", "probe web 9/SCTP", "db further 443/TCP",
	} {
		want[connection] = true
	}
	for _, from := range slices.Sorted(maps.Keys(world)) {
		for _, to := range slices.Sorted(maps.Keys(world)) {
			if from == to || world[from].name == "" && world[to].name == "" {
				continue
			}
			for _, port := range []string{"5432/TCP", "5433/TCP", "53/UDP", "53/TCP", "443/TCP", "443/UDP", "9/SCTP", "80/TCP"} {
				// What nothing was seen of is not isolated.
				workloads := [2]string{from, to}
				for i, name := range workloads {
					workloads[i], _, _ = strings.Cut(name, "-")
				}
				allow := want[workloads[0]+" "+workloads[1]+" "+port] || from == "bare" && (world[to].name == "") || to == "bare" && world[from].name == ""
				a := answer(t, e, from, to, port)
				if a.Disagree() {
					t.Errorf("%s to %s on %s: compiler and kernel disagree", from, to, port)
				}
				if got := a.Verdict() == reach.Allow; got != allow {
					t.Errorf("%s to %s on %s: allowed is %t, want %t, by\n%s", from, to, port, got, allow, suggested)
				}
			}
		}
	}
}

func answer(t *testing.T, e *reach.Evaluator, from, to, port string) reach.Answer {
	t.Helper()
	var parties [2]reach.Party
	for i, name := range []string{from, to} {
		text := world[name].address
		if p := world[name]; p.name != "" {
			text = p.namespace + "/" + p.name
		}
		var err error
		if parties[i], err = e.Party(text); err != nil {
			t.Fatal(err)
		}
	}
	at, err := reach.ParsePort(port)
	if err != nil {
		t.Fatal(err)
	}
	a, err := e.Ask(t.Context(), parties[0], parties[1], at)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// evaluator knows the world and policies.
func evaluator(t *testing.T, policies string) *reach.Evaluator {
	t.Helper()
	dir := t.TempDir()
	for _, namespace := range []string{"shop", "ops", "kube-system"} {
		policies += fmt.Sprintf("---\n{apiVersion: v1, kind: Namespace, metadata: {name: %s}}\n", namespace)
	}
	for _, p := range world {
		if p.name == "" {
			continue
		}
		var labels []string
		for k, v := range p.labels {
			labels = append(labels, fmt.Sprintf("%s: %q", k, v))
		}
		policies += fmt.Sprintf("---\n{apiVersion: v1, kind: Pod, metadata: {namespace: %s, name: %s, labels: {%s}}, status: {podIP: %s}}\n",
			p.namespace, p.name, strings.Join(labels, ", "), p.address)
	}
	if err := os.WriteFile(filepath.Join(dir, "a.yaml"), []byte(policies), 0o600); err != nil {
		t.Fatal(err)
	}
	e, err := reach.FromDirectory(t.Context(), dir, true, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	})
	if len(e.Problems) > 0 {
		t.Fatalf("%v of\n%s", e.Problems, policies)
	}
	return e
}

// The order of flows does not matter, nor how often one was seen.
func TestSameFlowsSamePolicies(t *testing.T) {
	all := seen()
	want := text(t, collect(suggest.Options{}, all))
	random := rand.New(rand.NewPCG(1, 2))
	for range 20 {
		shuffled := append(slices.Clone(all), all[random.IntN(len(all))])
		random.Shuffle(len(shuffled), func(i, j int) { shuffled[i], shuffled[j] = shuffled[j], shuffled[i] })
		if got := text(t, collect(suggest.Options{}, shuffled)); got != want {
			t.Fatalf("got\n%s\nwant\n%s", got, want)
		}
	}
}

func TestPolicies(t *testing.T) {
	const db = `---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  name: seen-db
  namespace: shop
spec:
  ingress:
  - from:
    - podSelector:
        matchLabels:
          app: web
    ports:
    - port: 5432
      protocol: TCP
  podSelector:
    matchLabels:
      app: db
  policyTypes:
  - Ingress
  - Egress
`
	for name, test := range map[string]struct {
		options suggest.Options
		flows   []*flowpb.Flow
		want    string // of the policies of db
		left    string // why a flow is left out, or nothing
	}{
		"audited":        {flows: flows("web-1", "db", "5432/TCP"), want: db},
		"allowed":        {flows: flows("web-1", "db", "5432/TCP", allowed), want: db},
		"denied":         {flows: flows("web-1", "db", "5432/TCP", denied)},
		"denied, wanted": {options: suggest.Options{Denied: true}, flows: flows("web-1", "db", "5432/TCP", denied), want: db},
		"spoofed": {options: suggest.Options{Denied: true},
			flows: flows("web-1", "db", "5432/TCP", denied, func(f *flowpb.Flow) { f.Extensions = details("spoofed-mac", false) })},
		"from the node":     {flows: flows("web-1", "db", "5432/TCP", allowed, func(f *flowpb.Flow) { f.Extensions = details("node", false) })},
		"to be judged yet":  {flows: flows("web-1", "db", "5432/TCP", allowed, func(f *flowpb.Flow) { f.Extensions = details("service", false) })},
		"reply":             {flows: flows("web-1", "db", "5432/TCP", func(f *flowpb.Flow) { f.IsReply = wrapperspb.Bool(true) })},
		"another namespace": {options: suggest.Options{Namespaces: []string{"ops"}}, flows: flows("web-1", "db", "5432/TCP")},
		"this namespace":    {options: suggest.Options{Namespaces: []string{"ops", "shop"}}, flows: flows("web-1", "db", "5432/TCP"), want: db},
		"middle of a connection": {flows: flows("web-1", "db", "5432/TCP", func(f *flowpb.Flow) { f.GetL4().GetTCP().Flags = &flowpb.TCPFlags{ACK: true} }),
			left: "the middle of a TCP connection"},
		"ICMP":            {flows: flows("web-1", "db", "echo"), left: "ICMP"},
		"peer unlabelled": {flows: flows("bare", "db", "5432/TCP"), left: "the peer shop/bare has no labels"},
		"pod unlabelled":  {flows: flows("web-1", "bare", "5432/TCP"), left: "shop/bare has no labels"},
		"Service": {flows: flows("web-1", "outside", "5432/TCP", func(f *flowpb.Flow) {
			f.DestinationService = &flowpb.Service{Namespace: "shop", Name: "db"}
		}), left: "Service shop/db"},
		"nothing": {flows: []*flowpb.Flow{{}}},
	} {
		t.Run(name, func(t *testing.T) {
			c := collect(test.options, test.flows)
			got := ""
			for _, document := range strings.SplitAfter(text(t, c), "  - Egress\n") {
				if strings.Contains(document, "name: seen-db") {
					got = document
				}
			}
			if got != test.want {
				t.Errorf("got\n%s\nwant\n%s", got, test.want)
			}
			left := strings.Join(slices.Sorted(maps.Keys(c.LeftOut())), "\n")
			if (left == "") != (test.left == "") || !strings.Contains(left, test.left) {
				t.Errorf("left out is %q, want %q", left, test.left)
			}
		})
	}
}

// Two workloads of one name that have different labels get policies of different
// names.
func TestNames(t *testing.T) {
	other := flows("web-1", "db", "5432/TCP", func(f *flowpb.Flow) {
		f.Destination.Labels = append(f.Destination.GetLabels(), "k8s:tier=two")
	})
	var names []string
	for _, p := range collect(suggest.Options{}, append(other, flows("web-1", "db", "5432/TCP")...)).Policies() {
		names = append(names, p.Name)
	}
	if want := []string{"seen-db", "seen-db-2", "seen-web"}; !slices.Equal(names, want) {
		t.Errorf("names are %q, want %q", names, want)
	}
}

// Whatever is claimed to have been seen, what comes of it is understood.
func FuzzCollector(f *testing.F) {
	for _, flow := range seen() {
		b, err := proto.Marshal(flow)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var flow flowpb.Flow
		if proto.Unmarshal(b, &flow) != nil {
			return
		}
		for _, p := range collect(suggest.Options{Denied: true}, []*flowpb.Flow{&flow}).Policies() {
			if p.Name == "" || p.Namespace == "" || len(p.Spec.PodSelector.MatchLabels) == 0 || len(p.Spec.Ingress)+len(p.Spec.Egress) != 1 {
				t.Errorf("of %v comes %v", &flow, p)
			}
		}
	})
}
