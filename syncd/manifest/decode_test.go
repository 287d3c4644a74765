// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/podgate/podgate/bpf/policy"
)

func TestDecode(t *testing.T) {
	const (
		ns  = "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n"
		pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: a, namespace: shop}\nspec: {unknownField: 1}\n"
	)
	tests := []struct {
		name, data string
		want       []string // object:line:document
	}{
		{"nothing", "", nil},
		{"comments only", "# nothing\n---\n  # more\n---\n", nil},
		{"null", "null\n", nil},
		{"two documents", ns + "---\n" + pod, []string{"Namespace shop:1:1", "Pod shop/a:5:2"}},
		{"separators, comments and blank lines", "---\n\n# first\n" + ns + "--- # and\n---\n\n" + pod + "---\n",
			[]string{"Namespace shop:4:1", "Pod shop/a:10:2"}},
		{"CRLF", strings.ReplaceAll(ns+"---\n"+pod, "\n", "\r\n"), []string{"Namespace shop:1:1", "Pod shop/a:5:2"}},
		{"no newline at the end", strings.TrimSpace(ns + "---\n" + pod), []string{"Namespace shop:1:1", "Pod shop/a:5:2"}},
		{"JSON with tabs and escapes", "{\n\t\"apiVersion\": \"v1\",\n\t\"kind\": \"Namespace\",\n\t\"metadata\": {\"name\": \"shop\", \"annotations\": {\"a\": \"\\ud83d\\ude00\\/\"}}\n}",
			[]string{"Namespace shop:1:1"}},
		{"list", "apiVersion: v1\nkind: List\nmetadata: {resourceVersion: \"\"}\nitems:\n- apiVersion: v1\n  kind: Namespace\n  metadata: {name: a}\n- apiVersion: v1\n  kind: Namespace\n  metadata: {name: b}\n",
			[]string{"Namespace a:5:1", "Namespace b:8:1"}},
		{"typed list", "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicyList\nitems:\n- metadata: {name: a}\n  spec: {podSelector: {}}\n",
			[]string{"NetworkPolicy default/a:4:1"}},
		{"empty list", "apiVersion: v1\nkind: PodList\nitems: []\n", nil},
		{"anchors", "apiVersion: v1\nkind: List\nitems:\n- &ns\n  apiVersion: v1\n  kind: Namespace\n  metadata: {name: a}\n",
			[]string{"Namespace a:4:1"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			objects, err := Decode("f.yaml", []byte(tt.data))
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, o := range objects {
				got = append(got, fmt.Sprintf("%v:%d:%d", o, o.Line, o.Document))
			}
			if !reflect.DeepEqual(got, tt.want) {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}

// TestDecodeKubectl reads what kubectl get pods,networkpolicies,namespaces
// -o yaml printed.
func TestDecodeKubectl(t *testing.T) {
	path := filepath.Join("testdata", "kubectl.yaml")
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	objects, err := Decode(path, data)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, o := range objects {
		got = append(got, o.String())
	}
	want := []string{"Pod shop/web-5d4f8c7b9-x2x7q", "NetworkPolicy shop/web", "Namespace shop"}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	if objects[0].Node != "worker-1" || !objects[2].Audit {
		t.Errorf("node %q, audit %v", objects[0].Node, objects[2].Audit)
	}
}

func TestDecodeFaults(t *testing.T) {
	const np = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: web, namespace: shop}\n"
	tests := []struct {
		name, data string
		want       []string
	}{
		{"unknown field of a policy", np + "spec:\n  podSelector:\n    matchlabels: {app: web}\n",
			[]string{`f.yaml:6: NetworkPolicy shop/web: unknown field "spec.podSelector.matchlabels"`}},
		{"unknown field in an array", np + "spec:\n  podSelector: {}\n  ingress:\n  - from: []\n  - form:\n    - podSelector: {}\n",
			[]string{`f.yaml:8: NetworkPolicy shop/web: unknown field "spec.ingress[1].form"`}},
		{"invalid value", np + "spec:\n  podSelector: {}\n  ingress:\n  - from:\n    - ipBlock:\n        cidr: 1.2.3.4\n",
			[]string{`f.yaml:9: NetworkPolicy shop/web: spec.ingress[0].from[0].ipBlock.cidr: Invalid value: "1.2.3.4"`}},
		{"wrong type", np + "spec: {podSelector: {matchLabels: {app: 1}}}\n",
			[]string{`f.yaml:1: NetworkPolicy shop/web: cannot unmarshal number`}},
		{"wrong type of the name", "apiVersion: v1\nkind: Pod\nmetadata: {name: 1}\n",
			[]string{`f.yaml:1: not a Kubernetes object: cannot unmarshal number`}},
		{"duplicate key", np + "spec:\n  podSelector: {}\n  ingress: []\n  ingress: [{}]\n",
			[]string{`f.yaml:7: key "ingress" already set in map`}},
		{"duplicate key in JSON", `{"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "a"},` + "\n" + ` "spec": {"podSelector": {}, "ingress": [], "ingress": [{}]}}`,
			[]string{`f.yaml:2: NetworkPolicy a: duplicate field "spec.ingress"`}},
		{"second document", "kind: Namespace\napiVersion: v1\nmetadata: {name: a}\n---\n" + np + "spec: {podSelector: {}, ingress: {}}\n",
			[]string{`f.yaml:5: document 2: NetworkPolicy shop/web: cannot unmarshal object`}},
		{"syntax", np + "---\nkind: [\nspec: a\n",
			[]string{`f.yaml:6: document 2: `}},
		{"unknown kind", "apiVersion: apps/v1\n# why\nkind: Deployment\nmetadata: {name: web}\n",
			[]string{`f.yaml:3: Deployment web: kind "apps/v1, Kind=Deployment" is not one of`}},
		{"old group", "apiVersion: extensions/v1beta1\nkind: NetworkPolicy\nmetadata: {name: web}\n",
			[]string{`f.yaml:2: NetworkPolicy web: kind "extensions/v1beta1, Kind=NetworkPolicy" is not one of`}},
		{"unknown kind in a list", "apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: Secret\n  metadata: {name: s}\n",
			[]string{`f.yaml:5: Secret s: kind "/v1, Kind=Secret" is not one of`}},
		{"misspelt items", "apiVersion: v1\nkind: List\nitmes: []\n", []string{`f.yaml:3: List: unknown field "itmes"`}},
		{"no kind", "apiVersion: v1\nmetadata: {name: a}\n", []string{`f.yaml:1: object a: kind is missing`}},
		{"not an object", "- a\n- b\n", []string{`f.yaml:1: not a Kubernetes object`}},
		{"a bare string", "hello\n", []string{`f.yaml:1: not a Kubernetes object`}},
		{"text after the separator", "a: b\n--- kind: Pod\n", []string{`f.yaml:2: unexpected "kind: Pod" after the document separator`}},
		{"a document after the end of one", np + "spec: {podSelector: {}}\n...\nkind: Pod\n",
			[]string{`did not find expected <document start>`}},
		{"a document hidden by other line ends", "kind: Pod\r---\rkind: Pod\n",
			[]string{`f.yaml:2: a second document must begin with ---`}},
		{"JSON documents in a row", "{\"a\": 1}\n{\"a\": 2}\n", []string{`did not find expected <document start>`}},
		{"binary", "\x00\x01\x02", []string{`f.yaml:1: `}},
		{"all faults of all documents", "kind: A\n---\nkind: B\n", []string{`f.yaml:1: `, `f.yaml:3: document 2: `}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			objects, err := Decode("f.yaml", []byte(tt.data))
			if err == nil {
				t.Fatalf("no error, objects %v", objects)
			}
			if objects != nil {
				t.Errorf("objects %v beside an error", objects)
			}
			rest := err.Error()
			for _, want := range tt.want {
				_, after, ok := strings.Cut(rest, want)
				if !ok {
					t.Fatalf("error %q does not say %q", err, want)
				}
				rest = after
			}
			var fault *FileError
			if !errors.As(err, &fault) || fault.File != "f.yaml" {
				t.Errorf("error %v is no *FileError", err)
			}
		})
	}
}

// FuzzDecode asks that no file panics the decoder, that objects and faults
// exclude each other, and that what comes out is what the compiler may rely on.
func FuzzDecode(f *testing.F) {
	data, err := os.ReadFile(filepath.Join("testdata", "kubectl.yaml"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Add([]byte("apiVersion: v1\nkind: List\nitems: [{apiVersion: v1, kind: Pod, metadata: {name: a}}]\n---\n"))
	f.Add([]byte("apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: a}\nspec: {podSelector: {}, egress: [{ports: [{port: 1, endPort: 9}], to: [{ipBlock: {cidr: ::/0, except: [fd00::/8]}}]}]}\n"))
	f.Add([]byte(`{"apiVersion":"v1","kind":"Namespace","metadata":{"name":"a"}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		objects, err := Decode("f", data)
		if err != nil && objects != nil {
			t.Fatalf("%d objects beside error %v", len(objects), err)
		}
		for _, o := range objects {
			if o.Line < 1 || o.Line > len(data)+1 {
				t.Errorf("%v: line %d of %d bytes", o, o.Line, len(data))
			}
			switch {
			case o.Policy != nil && o.Pod == nil && o.Namespace == nil:
				checkPolicy(t, o.Policy)
			case o.Pod != nil && o.Policy == nil && o.Namespace == nil:
				if o.Pod.Key == "" || o.Pod.Name == "" || o.Pod.Namespace == "" {
					t.Errorf("pod without identity: %+v", o.Pod)
				}
			case o.Namespace != nil && o.Policy == nil && o.Pod == nil:
				if o.Namespace.Name == "" {
					t.Error("namespace without a name")
				}
			default:
				t.Errorf("%v is not exactly one thing", o)
			}
		}
	})
}

func checkPolicy(t *testing.T, p *policy.Policy) {
	t.Helper()
	for d, rules := range p.Rules {
		if len(rules) > 0 && !p.Isolates[d] {
			t.Errorf("rules in direction %d, which is not isolated", d)
		}
		for _, r := range rules {
			if r.Action != policy.Allow || r.AnyPeer != (len(r.Peers) == 0) || r.AnyPort != (len(r.Ports) == 0) {
				t.Errorf("rule %+v", r)
			}
			for _, peer := range r.Peers {
				if (peer.Pods == nil) == (peer.Block == nil) {
					t.Errorf("peer %+v is not exactly one thing", peer)
				}
				if peer.Block == nil {
					continue
				}
				for _, e := range peer.Block.Except {
					if e != e.Masked() || !peer.Block.CIDR.Overlaps(e) || e.Bits() <= peer.Block.CIDR.Bits() {
						t.Errorf("except %v of %v", e, peer.Block.CIDR)
					}
				}
				if peer.Block.CIDR != peer.Block.CIDR.Masked() {
					t.Errorf("block %v is not masked", peer.Block.CIDR)
				}
			}
			for _, port := range r.Ports {
				if port.Last < port.First || port.Name != "" && port.Last != 0 {
					t.Errorf("port %+v", port)
				}
			}
		}
	}
}
