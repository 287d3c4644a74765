// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"fmt"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"

	"github.com/podgate/podgate/bpf/policy"
)

// closes describes what is left of a policy: the labels of its subject, what it
// isolates, and of each rule whether it matches anything.
func closes(p *policy.Policy) string {
	s := fmt.Sprintf("%s/%s %d isolates %v", p.Subject.Namespace, p.Name, len(p.Subject.Pods), p.Isolates)
	for d, rules := range p.Rules {
		for _, r := range rules {
			word := "rule"
			if !r.AnyPeer && len(r.Peers) == 0 {
				word = "nothing"
			}
			s += fmt.Sprintf(" %v:%s", policy.Direction(d), word)
		}
	}
	return s
}

func TestPolicyFromJSON(t *testing.T) {
	const (
		head = "metadata: {namespace: a, name: p, uid: u, managedFields: [{manager: x}], later: 1}\n"
		all  = "a/p 1 isolates [true true] ingress:rule ingress:rule egress:rule"
	)
	spec := func(podSelector, types, ingress, egress, more string) string {
		return head + fmt.Sprintf("spec: {podSelector: {matchLabels: {l: x}%s}, policyTypes: [%s], ingress: [{from: [{podSelector: {}%s}]}, {}], egress: [{to: [{podSelector: {}}]%s}]%s}",
			podSelector, types, ingress, egress, more)
	}
	for _, tt := range []struct{ name, manifest, want, fault string }{
		{name: "all known", manifest: spec("", "Ingress, Egress", "", "", ""), want: all},
		{name: "fields that are no part of the spec", manifest: spec("", "Ingress, Egress", "", "", "") + "\nstatus: {x: 1}\nlater: 1", want: all},
		{
			name: "a kind of peer, of two", manifest: spec("", "Ingress, Egress", "}, {serviceSelector: {}", "", ""),
			want:  "a/p 1 isolates [true true] ingress:nothing ingress:rule egress:rule",
			fault: "NetworkPolicy a/p: spec.ingress[0].from[1]: Required value: a peer needs a podSelector, a namespaceSelector or an ipBlock; spec.ingress[0].from[1].serviceSelector: Forbidden: this version of podgate does not know the field",
		},
		{
			name: "a restriction of a peer", manifest: spec("", "Ingress, Egress", ", nodeSelector: {}", "", ""),
			want:  "a/p 1 isolates [true true] ingress:nothing ingress:rule egress:rule",
			fault: "NetworkPolicy a/p: spec.ingress[0].from[0].nodeSelector: Forbidden",
		},
		{
			name: "a restriction of a rule", manifest: spec("", "Ingress, Egress", "", ", hours: 9-17", ""),
			want:  "a/p 1 isolates [true true] ingress:rule ingress:rule egress:nothing",
			fault: "NetworkPolicy a/p: spec.egress[0].hours: Forbidden",
		},
		{
			name: "in a direction that is not isolated", manifest: spec("", "Ingress", "", ", hours: 9-17", ""),
			want:  "a/p 1 isolates [true false] ingress:rule ingress:rule",
			fault: "NetworkPolicy a/p: spec.egress[0].hours: Forbidden",
		},
		{
			name: "in the selector", manifest: spec(", matchFields: {x: y}", "Ingress, Egress", "", "", ""),
			want:  "a/p 0 isolates [true true] ingress:rule ingress:rule egress:rule",
			fault: "NetworkPolicy a/p: spec.podSelector.matchFields: Forbidden",
		},
		{
			name: "in the spec", manifest: spec("", "Ingress", "", "", ", forward: [{}]"),
			want:  "a/p 1 isolates [true true] ingress:nothing ingress:nothing",
			fault: "NetworkPolicy a/p: spec.forward: Forbidden",
		},
		{
			name: "another type", manifest: head + "spec: {podSelector: x, ingress: [{}]}",
			want:  "a/p 0 isolates [true true]",
			fault: `NetworkPolicy a/p: spec: Invalid value: "": cannot unmarshal string into Go struct field`,
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			raw, err := yaml.YAMLToJSON([]byte(tt.manifest))
			if err != nil {
				t.Fatal(err)
			}
			o, err := PolicyFromJSON(raw)
			checkFault(t, err, tt.fault)
			if o.Policy == nil || o.Policy.UID != "u" {
				t.Fatalf("object %+v", o)
			}
			if got := closes(o.Policy); got != tt.want {
				t.Errorf("got %s, want %s", got, tt.want)
			}
		})
	}
}

// TestPolicyFromJSONManyUnknown asks that no rule escapes because there are so
// many like it.
func TestPolicyFromJSONManyUnknown(t *testing.T) {
	const n = 1000
	rules := strings.TrimSuffix(strings.Repeat(`{"hours": "9-17"},`, n), ",")
	o, err := PolicyFromJSON([]byte(`{"metadata": {"name": "p"}, "spec": {"podSelector": {}, "ingress": [` + rules + `]}}`))
	if err == nil {
		t.Fatal("no error")
	}
	for i, r := range o.Policy.Rules[policy.Ingress] {
		if r.AnyPeer {
			t.Fatalf("rule %d of %d matches", i, len(o.Policy.Rules[policy.Ingress]))
		}
	}
}

func FuzzPolicyFromJSON(f *testing.F) {
	f.Add([]byte(`{"metadata": {"namespace": "a", "name": "p"}, "spec": {"podSelector": {"x": 1}, "ingress": [{"from": [{"ipBlock": {"cidr": "::/0"}}], "x": {}}], "y": []}}`))
	f.Add([]byte(`{"metadata": {"name": "p"}, "spec": 1}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		o, err := PolicyFromJSON(raw)
		if o.Policy == nil {
			if err == nil {
				t.Fatal("neither policy nor error")
			}
			return
		}
		if err := policy.NewCompiler().SetPolicy(*o.Policy); err != nil {
			t.Fatalf("the compiler refuses it: %v", err)
		}
	})
}
