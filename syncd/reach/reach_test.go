// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package reach

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/podgate/podgate/bpf/policy"
)

// shop is a frontend, a shop that it may reach on port http, and a bystander.
const shop = `
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {team: sales}}
---
apiVersion: v1
kind: Pod
metadata: {name: frontend, namespace: shop, labels: {app: frontend}}
spec: {containers: [{name: c, image: i}]}
status: {podIPs: [{ip: 10.0.0.1}, {ip: "fd00::1"}]}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {app: web}}
spec: {containers: [{name: c, image: i, ports: [{name: http, containerPort: 8080}]}]}
status: {podIPs: [{ip: 10.0.0.2}, {ip: "fd00::2"}]}
---
apiVersion: v1
kind: Pod
metadata: {name: v4only}
status: {podIP: 10.0.0.3}
---
apiVersion: v1
kind: Pod
metadata: {name: unborn}
---
apiVersion: v1
kind: Pod
metadata: {name: done}
status: {phase: Succeeded}
---
apiVersion: v1
kind: Pod
metadata: {name: host}
spec: {hostNetwork: true}
status: {podIP: 192.0.2.1}
---
apiVersion: v1
kind: Pod
metadata: {name: watched, namespace: shop, labels: {app: web}, annotations: {podgate.io/audit: "true"}}
status: {podIP: 10.0.0.4}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web, namespace: shop}
spec:
  podSelector: {matchLabels: {app: web}}
  ingress:
  - from: [{podSelector: {matchLabels: {app: frontend}}}]
    ports: [{port: http}]
  - from: [{ipBlock: {cidr: 203.0.113.0/24, except: [203.0.113.128/25]}}]
    ports: [{port: 8080, endPort: 8090}, {protocol: UDP, port: 53}]
`

func directory(t *testing.T, text string) *Evaluator {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "a.yaml"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	e, err := FromDirectory(t.Context(), dir, true, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return e
}

func ask(t *testing.T, e *Evaluator, from, to, port string) (Answer, error) {
	t.Helper()
	p, err := ParsePort(port)
	if err != nil {
		t.Fatal(err)
	}
	source, err := e.Party(from)
	if err != nil {
		t.Fatal(err)
	}
	destination, err := e.Party(to)
	if err != nil {
		t.Fatal(err)
	}
	return e.Ask(t.Context(), source, destination, p)
}

// describe is an answer with a line for each path; rules by number, without
// their text.
func describe(a Answer) string {
	var b strings.Builder
	for _, p := range a.Paths {
		b.WriteString(p.From.String() + ">" + p.To.String() + " " + string(p.Verdict))
		for _, s := range p.Sides {
			reason, _, _ := strings.Cut(s.Compiler.Reason, ": ")
			b.WriteString("; " + s.Direction + " " + s.Pod + " " + string(s.Compiler.Verdict) + ", " + reason)
		}
		b.WriteString("\n")
	}
	return b.String()
}

func TestAsk(t *testing.T) {
	e := directory(t, shop)
	if len(e.Problems) > 0 {
		t.Fatalf("problems %v", e.Problems)
	}
	kernel := os.Getuid() == 0
	if kernel && e.KernelErr != nil {
		t.Fatalf("kernel: %v", e.KernelErr)
	}
	const open = "no policy isolates the pod, no rule matched"
	const isolated = "isolated by NetworkPolicy shop/web, no rule matched"
	tests := []struct {
		from, to, port string
		want           string
	}{
		{"shop/frontend", "shop/web", "8080/TCP",
			"10.0.0.1>10.0.0.2 allow; egress shop/frontend allow, " + open + "; ingress shop/web allow, NetworkPolicy shop/web, ingress rule 0\n" +
				"fd00::1>fd00::2 allow; egress shop/frontend allow, " + open + "; ingress shop/web allow, NetworkPolicy shop/web, ingress rule 0\n"},
		{"shop/frontend", "10.0.0.2", "TCP/80",
			"10.0.0.1>10.0.0.2 deny; egress shop/frontend allow, " + open + "; ingress shop/web deny, " + isolated + "\n"},
		{"shop/frontend", "shop/web", "8080/UDP",
			"10.0.0.1>10.0.0.2 deny; egress shop/frontend allow, " + open + "; ingress shop/web deny, " + isolated + "\n" +
				"fd00::1>fd00::2 deny; egress shop/frontend allow, " + open + "; ingress shop/web deny, " + isolated + "\n"},
		{"v4only", "shop/web", "8080",
			"10.0.0.3>10.0.0.2 deny; egress default/v4only allow, " + open + "; ingress shop/web deny, " + isolated + "\n"},
		{"203.0.113.7", "shop/web", "8085/TCP",
			"203.0.113.7>10.0.0.2 allow; ingress shop/web allow, NetworkPolicy shop/web, ingress rule 1\n"},
		{"203.0.113.200", "shop/web", "8085/TCP",
			"203.0.113.200>10.0.0.2 deny; ingress shop/web deny, " + isolated + "\n"},
		{"203.0.113.7", "shop/web", "53/UDP",
			"203.0.113.7>10.0.0.2 allow; ingress shop/web allow, NetworkPolicy shop/web, ingress rule 1\n"},
		{"203.0.113.7", "shop/web", "ICMP",
			"203.0.113.7>10.0.0.2 deny; ingress shop/web deny, " + isolated + "\n"},
		{"2001:db8::1", "shop/frontend", "ICMP",
			"2001:db8::1>fd00::1 allow; ingress shop/frontend allow, " + open + "\n"},
		{"shop/web", "1.1.1.1", "443/TCP",
			"10.0.0.2>1.1.1.1 allow; egress shop/web allow, " + open + "\n"},
		{"v4only", "shop/watched", "1/TCP",
			"10.0.0.3>10.0.0.4 audit; egress default/v4only allow, " + open + "; ingress shop/watched audit, " + isolated + "\n"},
		{"v4only", "unborn", "1/SCTP",
			"10.0.0.3>198.18.0.1 allow; egress default/v4only allow, " + open + "; ingress default/unborn allow, " + open + "\n"},
		{"host", "shop/web", "8080/TCP",
			"192.0.2.1>10.0.0.2 deny; egress default/host allow, policy does not select pods on the host network; ingress shop/web deny, " + isolated + "\n"},
	}
	for _, tt := range tests {
		t.Run(tt.from+" "+tt.to+" "+tt.port, func(t *testing.T) {
			a, err := ask(t, e, tt.from, tt.to, tt.port)
			if err != nil {
				t.Fatal(err)
			}
			if got := describe(a); got != tt.want {
				t.Errorf("got\n%swant\n%s", got, tt.want)
			}
			for _, p := range a.Paths {
				for _, s := range p.Sides {
					if asked := s.Kernel != nil; asked != (kernel && s.Pod != "default/host") {
						t.Errorf("%s of %s: kernel asked: %v, because %q", s.Direction, s.Pod, asked, s.Unasked)
					}
					if s.Disagree {
						t.Errorf("%s of %s: the compiler says %+v, the kernel %+v", s.Direction, s.Pod, s.Compiler, s.Kernel)
					}
				}
			}
		})
	}
	if a, err := ask(t, e, "shop/web", "1.1.1.1", "1/TCP"); err != nil || a.Disagree() {
		t.Errorf("answer %+v, error %v", a, err)
	}
}

// TestMatrix asks about everything and expects compiler and kernel to agree.
func TestMatrix(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root to ask the kernel")
	}
	e := directory(t, shop)
	pods := e.Pods()
	var names []string
	for _, p := range pods {
		names = append(names, p.Name)
	}
	want := []string{"default/unborn", "default/v4only", "shop/frontend", "shop/watched", "shop/web"}
	if !slices.Equal(names, want) {
		t.Fatalf("pods %q, want %q", names, want)
	}
	for _, from := range pods {
		for _, to := range pods {
			for _, text := range []string{"8080/TCP", "80/TCP", "53/UDP", "8080/SCTP", "ICMP"} {
				port, err := ParsePort(text)
				if err != nil {
					t.Fatal(err)
				}
				a, err := e.Ask(t.Context(), from, to, port)
				if err != nil {
					t.Fatal(err)
				}
				if a.Disagree() {
					t.Errorf("%s to %s on %s: %+v", from.Name, to.Name, text, a.Paths)
				}
				if from.Name == to.Name && a.Verdict() != Allow {
					t.Errorf("%s to itself on %s: %+v", from.Name, text, a.Paths)
				}
			}
		}
	}
}

func TestAskFaults(t *testing.T) {
	e := directory(t, shop)
	for _, tt := range []struct{ from, to, want string }{
		{"1.1.1.1", "2.2.2.2", "neither 1.1.1.1 nor 2.2.2.2 is a pod"},
		{"v4only", "fd00::1", "default/v4only has 10.0.0.3, shop/frontend has fd00::1: they share no address family"},
	} {
		if _, err := ask(t, e, tt.from, tt.to, "80/TCP"); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s to %s: error %v, want %q", tt.from, tt.to, err, tt.want)
		}
	}
	if _, err := e.Party("shop/nobody"); !errors.Is(err, ErrUnknown) || !strings.Contains(err.Error(), "known are default/done, default/host") {
		t.Errorf("unknown pod: %v", err)
	}
	if _, err := e.Party("done"); err == nil || !strings.Contains(err.Error(), "default/done has no address") {
		t.Errorf("pod without address: %v", err)
	}
	if _, err := e.Party("fe80::1%eth0"); err == nil {
		t.Error("an address with a zone")
	}
}

func TestParsePort(t *testing.T) {
	for text, want := range map[string]Port{
		"80": {policy.TCP, 80}, "80/TCP": {policy.TCP, 80}, "tcp/80": {policy.TCP, 80}, "UDP/53": {policy.UDP, 53},
		"5060/sctp": {policy.SCTP, 5060}, "icmp": {policy.ICMP, 0}, "65535/UDP": {policy.UDP, 65535},
	} {
		if got, err := ParsePort(text); err != nil || got != want {
			t.Errorf("%q: %v, error %v", text, got, err)
		}
	}
	for _, text := range []string{"", "TCP", "0", "65536", "-1/TCP", "80/HTTP", "80/90", "TCP/UDP", "80/TCP/x"} {
		if got, err := ParsePort(text); err == nil {
			t.Errorf("%q: %v", text, got)
		}
	}
}
