// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"net/netip"
	"reflect"
	"strings"
	"testing"

	networkingv1 "k8s.io/api/networking/v1"
	"sigs.k8s.io/yaml"

	"github.com/podgate/podgate/bpf/policy"
)

// networkPolicy is a NetworkPolicy shop/web with the given spec.
func networkPolicy(t *testing.T, spec string) *networkingv1.NetworkPolicy {
	t.Helper()
	np := &networkingv1.NetworkPolicy{}
	np.Namespace, np.Name = "shop", "web"
	if err := yaml.UnmarshalStrict([]byte(spec), &np.Spec); err != nil {
		t.Fatalf("spec: %v", err)
	}
	return np
}

func TestPolicy(t *testing.T) {
	inShop := func(reqs ...policy.Requirement) *policy.PodSelector {
		return &policy.PodSelector{Namespace: "shop", Pods: reqs}
	}
	label := func(k, v string) policy.Requirement {
		return policy.Requirement{Key: k, Operator: policy.In, Values: []string{v}}
	}
	anyone := policy.Rule{Action: policy.Allow, AnyPeer: true, AnyPort: true}
	tests := []struct {
		name, spec string
		subject    policy.Selector
		isolates   [2]bool
		ingress    []policy.Rule // Text is compared when set
		egress     []policy.Rule
	}{
		{
			name:     "empty spec isolates ingress of every pod",
			spec:     `podSelector: {}`,
			isolates: [2]bool{true, false},
		},
		{
			name:     "egress rules isolate egress too",
			spec:     `{podSelector: {}, egress: [{}]}`,
			isolates: [2]bool{true, true},
			egress:   []policy.Rule{{Action: policy.Allow, AnyPeer: true, AnyPort: true, Text: "to anywhere on any port"}},
		},
		{
			name:     "an empty egress list is no reason to isolate egress",
			spec:     `{podSelector: {}, ingress: [], egress: []}`,
			isolates: [2]bool{true, false},
		},
		{
			name:     "empty policyTypes are missing policyTypes",
			spec:     `{podSelector: {}, policyTypes: [], egress: [{}]}`,
			isolates: [2]bool{true, true},
			egress:   []policy.Rule{anyone},
		},
		{
			name:     "egress only",
			spec:     `{podSelector: {}, policyTypes: [Egress]}`,
			isolates: [2]bool{false, true},
		},
		{
			name:     "rules of a direction that policyTypes leaves out do nothing",
			spec:     `{podSelector: {}, policyTypes: [Ingress], ingress: [{}], egress: [{}]}`,
			isolates: [2]bool{true, false},
			ingress:  []policy.Rule{anyone},
		},
		{
			name:     "nil and empty peers and ports are anyone and any port",
			spec:     `{podSelector: {}, ingress: [{from: [], ports: []}, {}]}`,
			isolates: [2]bool{true, false},
			ingress:  []policy.Rule{anyone, anyone},
		},
		{
			name: "selector in a stable order with every operator",
			spec: `
podSelector:
  matchLabels: {b: "2", a: "1", c: ""}
  matchExpressions:
  - {key: x, operator: NotIn, values: [p, q]}
  - {key: "y", operator: Exists}
  - {key: z, operator: DoesNotExist}
  - {key: w, operator: In, values: [r]}`,
			subject: policy.Selector{
				label("a", "1"), label("b", "2"), label("c", ""),
				{Key: "x", Operator: policy.NotIn, Values: []string{"p", "q"}},
				{Key: "y", Operator: policy.Exists}, {Key: "z", Operator: policy.DoesNotExist},
				label("w", "r"),
			},
			isolates: [2]bool{true, false},
		},
		{
			name: "peers: own namespace, other namespaces, both, all, block",
			spec: `
podSelector: {}
ingress:
- from:
  - podSelector: {matchLabels: {app: web}}
  - namespaceSelector: {matchLabels: {team: a}}
  - namespaceSelector: {matchLabels: {team: a}}
    podSelector: {matchLabels: {app: web}}
  - namespaceSelector: {}
  - podSelector: {}
  - ipBlock: {cidr: 10.1.2.3/8, except: [10.1.0.0/16, 10.2.3.4/32]}
  - ipBlock: {cidr: "2001:db8::1/32"}
  - ipBlock: {cidr: 0.0.0.0/0}`,
			isolates: [2]bool{true, false},
			ingress: []policy.Rule{{
				Action: policy.Allow, AnyPort: true,
				Peers: []policy.Peer{
					{Pods: inShop(label("app", "web"))},
					{Pods: &policy.PodSelector{Namespaces: policy.Selector{label("team", "a")}}},
					{Pods: &policy.PodSelector{Namespaces: policy.Selector{label("team", "a")}, Pods: policy.Selector{label("app", "web")}}},
					{Pods: &policy.PodSelector{}},
					{Pods: inShop()},
					{Block: &policy.Block{
						CIDR:   netip.MustParsePrefix("10.0.0.0/8"),
						Except: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16"), netip.MustParsePrefix("10.2.3.4/32")},
					}},
					{Block: &policy.Block{CIDR: netip.MustParsePrefix("2001:db8::/32")}},
					{Block: &policy.Block{CIDR: netip.MustParsePrefix("0.0.0.0/0")}},
				},
				Text: "from pods app=web in namespace shop or all pods in namespaces team=a or pods app=web in namespaces team=a" +
					" or all pods in all namespaces or all pods in namespace shop or 10.1.2.3/8 except 10.1.0.0/16, 10.2.3.4/32" +
					" or 2001:db8::1/32 or 0.0.0.0/0 on any port",
			}},
		},
		{
			name: "ports: default protocol, protocol alone, range, name",
			spec: `
podSelector: {}
policyTypes: [Egress]
egress:
- to: [{podSelector: {matchLabels: {app: db}}}]
  ports:
  - {}
  - port: 80
  - {protocol: UDP, port: 53}
  - {protocol: SCTP}
  - {protocol: UDP, port: 8000, endPort: 9000}
  - {port: 443, endPort: 443}
  - {port: http}
  - {protocol: SCTP, port: sig}`,
			isolates: [2]bool{false, true},
			egress: []policy.Rule{{
				Action: policy.Allow,
				Peers:  []policy.Peer{{Pods: inShop(label("app", "db"))}},
				Ports: []policy.Port{
					{Protocol: policy.TCP, First: 0, Last: 65535},
					{Protocol: policy.TCP, First: 80, Last: 80},
					{Protocol: policy.UDP, First: 53, Last: 53},
					{Protocol: policy.SCTP, First: 0, Last: 65535},
					{Protocol: policy.UDP, First: 8000, Last: 9000},
					{Protocol: policy.TCP, First: 443, Last: 443},
					{Protocol: policy.TCP, Name: "http"},
					{Protocol: policy.SCTP, Name: "sig"},
				},
				Text: "to pods app=db in namespace shop on any TCP port, 80/TCP, 53/UDP, any SCTP port, 8000-9000/UDP, 443/TCP, http/TCP, sig/SCTP",
			}},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := Policy(networkPolicy(t, tt.spec))
			if err != nil {
				t.Fatal(err)
			}
			want := policy.Policy{
				UID: "NetworkPolicy/shop/web", Kind: "NetworkPolicy", Namespace: "shop", Name: "web",
				Tier:     policy.TierNamespace,
				Subject:  policy.PodSelector{Namespace: "shop", Pods: tt.subject},
				Isolates: tt.isolates,
				Rules:    [2][]policy.Rule{tt.ingress, tt.egress},
			}
			for d := range want.Rules {
				for i := range want.Rules[d] {
					if i < len(got.Rules[d]) && want.Rules[d][i].Text == "" {
						got.Rules[d][i].Text = ""
					}
				}
			}
			if !reflect.DeepEqual(got, want) {
				t.Errorf("got\n%+v\nwant\n%+v", got, want)
			}
		})
	}
}

func TestPolicyIdentity(t *testing.T) {
	np := networkPolicy(t, `podSelector: {}`)
	np.Namespace, np.UID = "", "1234"
	got, err := Policy(np)
	if err != nil {
		t.Fatal(err)
	}
	if got.UID != "1234" || got.Namespace != "default" || got.Subject.Namespace != "default" {
		t.Errorf("got UID %q, namespace %q, subject namespace %q", got.UID, got.Namespace, got.Subject.Namespace)
	}
}

func TestPolicyFaults(t *testing.T) {
	tests := []struct {
		name, spec string
		want       []string // each in the error, in this order
	}{
		{"bad CIDR", `{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/33}}]}]}`,
			[]string{`NetworkPolicy shop/web: spec.ingress[0].from[0].ipBlock.cidr: Invalid value: "10.0.0.0/33"`}},
		{"CIDR without length", `{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 10.0.0.1}}]}]}`,
			[]string{`ipBlock.cidr: Invalid value: "10.0.0.1"`}},
		{"empty CIDR", `{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: ""}}]}]}`,
			[]string{`ipBlock.cidr: Invalid value: ""`}},
		{"octets with leading zeros", `{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 010.0.0.0/8}}]}]}`,
			[]string{`ipBlock.cidr: Invalid value: "010.0.0.0/8"`}},
		{"mapped CIDR", `{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: "::ffff:10.0.0.0/104"}}]}]}`,
			[]string{`ipBlock.cidr: Invalid value: "::ffff:10.0.0.0/104": must not be an IPv4-mapped`}},
		{"except outside", `{podSelector: {}, egress: [{to: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.1.0.0/16, 11.0.0.0/16]}}]}]}`,
			[]string{`spec.egress[0].to[0].ipBlock.except[1]: Invalid value: "11.0.0.0/16": must be a strict subset of cidr 10.0.0.0/8`}},
		{"except of the other family", `{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 0.0.0.0/0, except: ["::/1"]}}]}]}`,
			[]string{`except[0]: Invalid value: "::/1": must be a strict subset`}},
		{"except equal to the block", `{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.0.0.0/8]}}]}]}`,
			[]string{`except[0]: Invalid value: "10.0.0.0/8": must be a strict subset`}},
		{"bad except", `{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [nonsense]}}]}]}`,
			[]string{`except[0]: Invalid value: "nonsense": must be a CIDR`}},
		{"endPort without port", `{podSelector: {}, ingress: [{ports: [{endPort: 90}]}]}`,
			[]string{`spec.ingress[0].ports[0].port: Required value`}},
		{"endPort below port", `{podSelector: {}, ingress: [{ports: [{port: 90, endPort: 80}]}]}`,
			[]string{`ports[0].endPort: Invalid value: 80: must not be below port 90`}},
		{"endPort with a name", `{podSelector: {}, ingress: [{ports: [{port: http, endPort: 80}]}]}`,
			[]string{`ports[0].endPort: Invalid value: 80: must not be set when port is a name`}},
		{"endPort too large", `{podSelector: {}, ingress: [{ports: [{port: 1, endPort: 65536}]}]}`,
			[]string{`ports[0].endPort: Invalid value: 65536: must be between 1 and 65535`}},
		{"port 0", `{podSelector: {}, ingress: [{ports: [{port: 0}]}]}`,
			[]string{`ports[0].port: Invalid value: 0`}},
		{"port too large", `{podSelector: {}, ingress: [{ports: [{port: 65616}]}]}`,
			[]string{`ports[0].port: Invalid value: 65616`}},
		{"number as a name", `{podSelector: {}, ingress: [{ports: [{port: "80"}]}]}`,
			[]string{`ports[0].port: Invalid value: "80"`}},
		{"unknown protocol", `{podSelector: {}, ingress: [{ports: [{protocol: ICMP}]}]}`,
			[]string{`ports[0].protocol: Unsupported value: "ICMP"`}},
		{"lower-case protocol", `{podSelector: {}, ingress: [{ports: [{protocol: tcp, port: 1}]}]}`,
			[]string{`ports[0].protocol: Unsupported value: "tcp"`}},
		{"unknown operator", `{podSelector: {matchExpressions: [{key: a, operator: Is, values: [b]}]}}`,
			[]string{`spec.podSelector.matchExpressions[0].operator: Invalid value: "Is"`}},
		{"In without values", `{podSelector: {matchExpressions: [{key: a, operator: In}]}}`,
			[]string{`spec.podSelector.matchExpressions[0].values: Required value`}},
		{"Exists with values", `{podSelector: {matchExpressions: [{key: a, operator: Exists, values: [b]}]}}`,
			[]string{`matchExpressions[0].values: Forbidden`}},
		{"bad label value", `{podSelector: {matchLabels: {a: "b c"}}}`,
			[]string{`spec.podSelector.matchLabels: Invalid value: "b c"`}},
		{"bad label key", `{podSelector: {matchLabels: {"a b": c}}}`,
			[]string{`spec.podSelector.matchLabels: Invalid value: "a b"`}},
		{"block and selector", `{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8}, podSelector: {}}]}]}`,
			[]string{`from[0]: Forbidden: a peer with an ipBlock must not have selectors`}},
		{"empty peer", `{podSelector: {}, ingress: [{from: [{}]}]}`,
			[]string{`spec.ingress[0].from[0]: Required value: a peer needs`}},
		{"unknown policy type", `{podSelector: {}, policyTypes: [Ingress, ingress]}`,
			[]string{`spec.policyTypes[1]: Unsupported value: "ingress"`}},
		{"a fault in a direction that is not isolated", `{podSelector: {}, policyTypes: [Ingress], egress: [{to: [{}]}]}`,
			[]string{`spec.egress[0].to[0]: Required value`}},
		{"every fault is named", `{podSelector: {}, ingress: [{from: [{}], ports: [{port: 0}]}], egress: [{to: [{}]}]}`,
			[]string{`spec.ingress[0].from[0]`, `spec.ingress[0].ports[0].port`, `spec.egress[0].to[0]`}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Policy(networkPolicy(t, tt.spec))
			if err == nil {
				t.Fatal("no error")
			}
			rest := err.Error()
			for _, want := range tt.want {
				_, after, ok := strings.Cut(rest, want)
				if !ok {
					t.Fatalf("error %q does not say %q", err, want)
				}
				rest = after
			}
		})
	}
}

func TestPolicyNames(t *testing.T) {
	for name, meta := range map[string][2]string{
		"no name":       {"shop", ""},
		"bad name":      {"shop", "We\nb"},
		"bad namespace": {"sh.op", "web"},
	} {
		np := networkPolicy(t, `podSelector: {}`)
		np.Namespace, np.Name = meta[0], meta[1]
		if _, err := Policy(np); err == nil || !strings.Contains(err.Error(), "metadata.name") {
			t.Errorf("%s: error %v", name, err)
		}
	}
}
