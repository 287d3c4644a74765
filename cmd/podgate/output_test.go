// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"bytes"
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/podgate/podgate/pinning"
	"github.com/podgate/podgate/syncd/reach"
	"github.com/podgate/podgate/syncd/source"
	"github.com/podgate/podgate/syncd/status"
)

var noon = time.Date(2026, 5, 4, 12, 0, 0, 0, time.UTC)

// testApp writes to the buffer it returns.
func testApp(variables map[string]string) (*app, *bytes.Buffer) {
	var out bytes.Buffer
	return &app{
		env: env{
			Stdout: &out, Stderr: &out,
			Getenv: func(name string) string { return variables[name] },
			Now:    func() time.Time { return noon },
		},
		output: outputText,
	}, &out
}

// golden compares output with testdata/NAME; UPDATE_GOLDEN=1 rewrites it.
func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if os.Getenv("UPDATE_GOLDEN") != "" {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

// both compares the text and the JSON of a report.
func both(t *testing.T, name string, report any, write func(a *app, w *bytes.Buffer)) {
	t.Helper()
	a, out := testApp(nil)
	write(a, out)
	golden(t, name+".txt", out.String())
	out.Reset()
	a.output = outputJSON
	if err := a.print(report, nil); err != nil {
		t.Fatal(err)
	}
	if !json.Valid(out.Bytes()) {
		t.Errorf("not JSON: %s", out)
	}
	golden(t, name+".json", out.String())
}

func TestWriteStatus(t *testing.T) {
	r := &statusReport{
		Version: "v1.2.3", Instance: "/sys/fs/bpf/podgate", ABI: 1,
		Daemon: &daemonReport{Running: true, Status: status.Status{
			PID: 4711, Version: "v1.2.3", Started: noon.Add(-26 * time.Hour), Updated: noon.Add(-3 * time.Second),
			Synced: noon.Add(-90 * time.Second), Origin: status.Origin{Node: "n1", PolicyDir: "/etc/podgate/policies"},
			Policies: 1, Pods: 12, Namespaces: 2, Endpoints: 2, Problems: []source.Problem{},
		}},
		Endpoints: []endpointReport{
			{
				Name: "shop/web", Attachment: pinning.AttachmentKey{ContainerID: strings.Repeat("a1", 32), IfName: "eth0"},
				PodUID: "u1", Subject: "u1",
				Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("fd00::2"), netip.MustParseAddr("fe80::1")},
				MAC:       "02:00:00:00:00:02", Network: "pods", NetNS: "/run/netns/a", ID: 1, Gate: 7, HostIfindex: 7,
				HostInterface: "veth1", Attach: "clsact", Mode: "closed", AntiSpoof: true, Created: noon.Add(-time.Hour),
				State: "enforcing", Rulesets: rulesetNumbers{2, 1},
				Counters: pinning.EndpointCounters{AllowedPackets: [2]uint64{10, 20}, DroppedPackets: [2]uint64{3, 0}},
			},
			{
				Name: "c0ffee", Attachment: pinning.AttachmentKey{ContainerID: "c0ffee", IfName: "eth0"},
				Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.3")}, MAC: "02:00:00:00:00:03", Network: "pods",
				NetNS: "/run/netns/b", ID: 2, Gate: 8, HostIfindex: 8, Attach: "tcx", Mode: "closed", Audit: true,
				Created: noon.Add(-time.Hour), State: "closed",
			},
		},
		Services: serviceReport{"after translation", 12},
		Drops:    []dropReport{{"default", "ingress", pinning.Counter{Packets: 3, Bytes: 222}}},
		Maps: []pinning.MapUsage{
			{Name: "cells", Used: 950, Max: 1000, Bytes: 1 << 20}, {Name: "events", Used: -1, Max: 1 << 20, Bytes: 1 << 20},
			{Name: "flows", Used: 1000, Max: 1000, Bytes: 5 << 20},
		},
		Problems: []source.Problem{
			{Subject: "endpoint c0ffee", Reason: "closed: its policy is not known"},
			{Subject: "/etc/podgate/policies/a.yaml", Reason: "/etc/podgate/policies/a.yaml:7: broken", Since: noon.Add(-5 * time.Minute)},
		},
	}
	both(t, "status", r, func(a *app, w *bytes.Buffer) { a.writeStatus(w, r) })

	empty := &statusReport{Version: "v1", Instance: "/i", ABI: 1}
	a, out := testApp(nil)
	a.writeStatus(out, empty)
	golden(t, "status-empty.txt", out.String())
}

func TestWritePolicy(t *testing.T) {
	reports := []policyReport{
		{
			Endpoint: "shop/web", Attachment: pinning.AttachmentKey{ContainerID: "c0ffee", IfName: "eth0"},
			Ingress: directionReport{State: "enforcing", Ruleset: 2, Default: "deny", Policies: []memberReport{
				{
					Policy: "NetworkPolicy shop/web",
					Rules: []ruleReport{
						{0, "allow", "from pods app=client in namespace shop on 80/TCP", pinning.Counter{Packets: 1, Bytes: 74}},
						{1, "allow", "from 10.0.0.0/8 on any port", pinning.Counter{Packets: 20000, Bytes: 3 << 30}},
					},
					Isolation: &pinning.Counter{Packets: 3, Bytes: 222},
				},
				{Policy: "NetworkPolicy shop/zero", Rules: []ruleReport{}},
			}},
			Egress: directionReport{State: "open", Ruleset: 1, Default: "allow"},
		},
		{
			Endpoint: "shop/x", Attachment: pinning.AttachmentKey{ContainerID: "f00d", IfName: "eth0"}, Audit: true,
			Ingress: directionReport{State: "closed", Default: "deny"}, Egress: directionReport{State: "closed", Default: "deny"},
		},
	}
	both(t, "policy", reports, func(a *app, w *bytes.Buffer) { a.writePolicy(w, reports) })
}

func TestFamilyWord(t *testing.T) {
	v4, v6 := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1")
	path := func(from netip.Addr, v reach.Word) reach.Path { return reach.Path{From: from, Verdict: v} }
	for want, paths := range map[string][]reach.Path{
		"v4":  {path(v4, reach.Allow), path(v4, reach.Allow), path(v6, reach.Deny)},
		"v6":  {path(v4, reach.Deny), path(v6, reach.Audit)},
		mixed: {path(v4, reach.Allow), path(v4, reach.Deny), path(v6, reach.Deny)},
	} {
		if got := familyWord(paths); got != want {
			t.Errorf("%v: %s, want %s", paths, got, want)
		}
	}
}

func TestWriteExplanation(t *testing.T) {
	x := &explanation{
		About: "what is enforced on this node", Verdict: "mixed", Disagree: true,
		Answer: reach.Answer{From: "shop/client", To: "shop/web", Protocol: "TCP", Port: 80, Paths: []reach.Path{
			{
				From: netip.MustParseAddr("10.0.0.1"), To: netip.MustParseAddr("10.0.0.2"), Verdict: reach.Allow,
				Sides: []reach.Side{
					{
						Pod: "shop/client", Direction: "egress", Verdict: reach.Allow,
						Compiler: &reach.Opinion{Verdict: reach.Allow, Reason: "no policy isolates the pod, no rule matched"},
						Unasked:  "the kernel is not asked: the pod is not attached to this node",
					},
					{
						Pod: "shop/web", Direction: "ingress", Verdict: reach.Allow,
						Compiler: &reach.Opinion{Verdict: reach.Allow, Reason: "NetworkPolicy shop/web, ingress rule 0: from anywhere on 80/TCP", Policy: "NetworkPolicy shop/web", Rule: "from anywhere on 80/TCP"},
						Kernel:   &reach.Opinion{Verdict: reach.Allow, Reason: "a rule matches", Policy: "NetworkPolicy shop/web", Rule: "from anywhere on 80/TCP"},
					},
				},
			},
			{
				From: netip.MustParseAddr("fd00::1"), To: netip.MustParseAddr("fd00::2"), Verdict: reach.Deny,
				Sides: []reach.Side{{
					Pod: "shop/web", Direction: "ingress", Verdict: reach.Deny, Disagree: true,
					Compiler: &reach.Opinion{Verdict: reach.Allow, Reason: "no policy isolates the pod, no rule matched"},
					Kernel:   &reach.Opinion{Verdict: reach.Deny, Reason: "no rule matches", Policy: "NetworkPolicy shop/old"},
				}},
			},
		}},
		Caveats: []string{"something to know"},
	}
	port := reach.Port{Protocol: 6, Port: 80}
	both(t, "explain", x, func(a *app, w *bytes.Buffer) { a.writeExplanation(w, x, port) })
}

func TestWriteMatrix(t *testing.T) {
	ports := []reach.Port{{Protocol: 6, Port: 80}, {Protocol: 17, Port: 53}}
	r := &matrixReport{
		About: "what is enforced on this node", Parties: []string{"shop/client", "1.1.1.1"}, Disagree: 1,
		Cells: []matrixCell{
			{"shop/client", "shop/client", "80/TCP", "allow", false}, {"shop/client", "1.1.1.1", "80/TCP", "deny", false},
			{"1.1.1.1", "shop/client", "80/TCP", "audit", false}, {"1.1.1.1", "1.1.1.1", "80/TCP", "-", false},
			{"shop/client", "shop/client", "53/UDP", "v4", false}, {"shop/client", "1.1.1.1", "53/UDP", "deny", true},
			{"1.1.1.1", "shop/client", "53/UDP", "allow", false}, {"1.1.1.1", "1.1.1.1", "53/UDP", "-", false},
		},
	}
	both(t, "matrix", r, func(a *app, w *bytes.Buffer) { a.writeMatrix(w, r, ports) })

	// Long names give way to numbers.
	r.Parties = []string{strings.Repeat("x", 60), strings.Repeat("y", 60)}
	a, out := testApp(nil)
	a.writeMatrix(out, r, ports[:1])
	if !strings.Contains(out.String(), "80/TCP") || !strings.Contains(out.String(), "[2] yyy") {
		t.Errorf("matrix:\n%s", out)
	}
}

func TestWriteFlow(t *testing.T) {
	a, out := testApp(nil)
	local, peer := netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("fd00::1")
	for _, r := range []flowReport{
		{Time: noon, Verdict: "denied", Direction: "ingress", Reason: "default", Pod: "shop/web", Peer: "shop/other", LocalAddress: local,
			PeerAddress: local.Next(), LocalPort: 80, PeerPort: 40000, Protocol: "TCP", Detail: "SYN", Policy: "NetworkPolicy shop/web", Rule: "isolated, no rule matched"},
		{Time: noon, Verdict: "allowed", Direction: "egress", Reason: "open", LocalAddress: peer, PeerAddress: peer, Protocol: "ICMPv6", Detail: "type 128 code 0"},
		{Time: noon, Verdict: "allowed", Direction: "egress", Reason: "policy", Pod: "shop/web", Peer: "shop/db", LocalAddress: local, LocalPort: 40000,
			PeerAddress: local.Next(), PeerPort: 5432, Protocol: "TCP", Service: "shop/db:sql", Frontend: netip.MustParseAddrPort("10.96.0.7:1")},
		{Time: noon, Verdict: "denied", Direction: "egress", Reason: "service-mixed", LocalAddress: local, PeerAddress: local.Next(), PeerPort: 80, Protocol: "TCP", Service: "shop/db"},
		{Time: noon, Verdict: "allowed", Direction: "egress", Reason: "policy", LocalAddress: local, PeerAddress: local.Next(), PeerPort: 80, Protocol: "TCP",
			Service: "shop/db", Peer: "shop/db-0", Backend: netip.MustParseAddrPort("10.0.0.9:8080")},
	} {
		if err := a.writeFlow(&r); err != nil {
			t.Fatal(err)
		}
	}
	at := noon.Local().Format("15:04:05.000")
	want := at + " denied  ingress shop/other 10.0.0.3:40000 -> shop/web 10.0.0.2:80 TCP SYN (NetworkPolicy shop/web: isolated, no rule matched)\n" +
		at + " allowed egress  fd00::1 -> fd00::1 ICMPv6 type 128 code 0 (open)\n" +
		at + " allowed egress  shop/web 10.0.0.2:40000 -> shop/db 10.0.0.3:5432 over service shop/db:sql 10.96.0.7:1 TCP (policy)\n" +
		at + " denied  egress  10.0.0.2 -> service shop/db 10.0.0.3:80 TCP (service-mixed)\n" +
		at + " allowed egress  10.0.0.2 -> shop/db-0 10.0.0.9:8080 over service shop/db 10.0.0.3:80 TCP (policy)\n"
	if out.String() != want {
		t.Errorf("got\n%swant\n%s", out, want)
	}
}

func TestPaint(t *testing.T) {
	for _, tt := range []struct {
		terminal  bool
		variables map[string]string
		want      string
	}{
		{false, nil, "x"},
		{true, nil, "\x1b[31mx\x1b[0m"},
		{true, map[string]string{"NO_COLOR": "1"}, "x"},
		{true, map[string]string{"TERM": "dumb"}, "x"},
	} {
		a, _ := testApp(tt.variables)
		a.Terminal = tt.terminal
		if got := a.paint(red, "x"); got != tt.want {
			t.Errorf("terminal %v, %v: %q, want %q", tt.terminal, tt.variables, got, tt.want)
		}
	}
}

func TestFlowFilter(t *testing.T) {
	r := flowReport{
		Verdict: "denied", Direction: "ingress", Pod: "shop/web", Peer: "default/client", Attachment: "c0ffee/eth0",
		LocalAddress: netip.MustParseAddr("10.0.0.2"), PeerAddress: netip.MustParseAddr("10.0.1.7"),
		LocalPort: 80, PeerPort: 40000, Protocol: "TCP",
	}
	for name, tt := range map[string]struct {
		filter flowFilter
		want   bool
	}{
		"nothing":           {flowFilter{}, true},
		"verdict":           {flowFilter{verdicts: []string{"allowed", "denied"}}, true},
		"other verdict":     {flowFilter{verdicts: []string{"allowed"}}, false},
		"direction":         {flowFilter{directions: []string{"egress"}}, false},
		"protocol":          {flowFilter{protocols: []string{"tcp"}}, true},
		"port":              {flowFilter{ports: []uint{40000}}, true},
		"other port":        {flowFilter{ports: []uint{81}}, false},
		"pod":               {flowFilter{pods: []string{"shop/web"}}, true},
		"container":         {flowFilter{pods: []string{"c0ff"}}, true},
		"other pod":         {flowFilter{pods: []string{"web"}}, false},
		"peer pod":          {flowFilter{peers: []string{"client"}}, true},
		"peer address":      {flowFilter{peers: []string{"10.0.1.7"}}, true},
		"peer block":        {flowFilter{peers: []string{"10.0.1.0/24"}}, true},
		"other block":       {flowFilter{peers: []string{"10.0.2.0/24"}}, false},
		"one of two peers":  {flowFilter{peers: []string{"10.0.2.0/24", "default/client"}}, true},
		"all must match":    {flowFilter{pods: []string{"shop/web"}, verdicts: []string{"allowed"}}, false},
		"own address":       {flowFilter{peers: []string{"10.0.0.2"}}, false},
		"every kind at all": {flowFilter{pods: []string{"shop/web"}, peers: []string{"::/0", "0.0.0.0/0"}, ports: []uint{80}}, true},
	} {
		if err := tt.filter.parse(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if got := tt.filter.matches(&r); got != tt.want {
			t.Errorf("%s: %v, want %v", name, got, tt.want)
		}
	}
}
