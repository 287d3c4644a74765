// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	observerpb "github.com/cilium/cilium/api/v1/observer"
	"google.golang.org/protobuf/encoding/protojson"
	networkingv1 "k8s.io/api/networking/v1"
)

// TestSuggest goes from open to closed: a namespace under audit, what is
// suggested put into force, audit ended. What was seen goes on, nothing else
// does.
func TestSuggest(t *testing.T) {
	t.Parallel()
	const pods = `
apiVersion: v1
kind: Namespace
metadata: {name: shop, annotations: {podgate.io/audit: "AUDIT"}}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, uid: uid-web, labels: {app: web, pod-template-hash: 5d9f}}
spec: {nodeName: n1}
---
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: shop, uid: uid-client, labels: {app: client}}
spec: {nodeName: n1}
---
apiVersion: v1
kind: Pod
metadata: {name: stranger, namespace: shop, uid: uid-stranger, labels: {app: stranger}}
spec: {nodeName: n1}
`
	const isolated = `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {namespace: shop, name: none}
spec: {podSelector: {}, policyTypes: [Ingress, Egress]}
`
	l := newLab(t)
	l.write("pods.yaml", strings.ReplaceAll(pods, "AUDIT", "true"))
	l.write("isolated.yaml", isolated)
	l.sync()
	l.until("synced", func() bool { return l.status().Daemon != nil && !l.status().Daemon.Synced.IsZero() })
	for _, pod := range []string{"web", "client", "stranger"} {
		l.addPod(pod)
	}
	l.until("enforcing", func() bool { return states(l.status())["shop/web"] == "enforcing" })
	l.listen("web")
	if code, _, errs := l.run("suggest"); code != 1 || !strings.Contains(errs, "podgate observe does not answer") {
		t.Errorf("without an observer: %d, %s", code, errs)
	}
	l.background("observe")
	c := l.observer()
	if !l.reaches("client", "web") {
		t.Fatal("audit mode lets nothing through")
	}
	var suggested string
	l.until("suggested", func() bool {
		suggested = l.ok(0, "suggest", "--namespace", "shop")
		return strings.Contains(suggested, "name: seen-web") && strings.Contains(suggested, "name: seen-client")
	})
	if again := l.ok(0, "suggest", "-o", "yaml"); again != suggested {
		t.Errorf("then\n%s\nand now\n%s", suggested, again)
	}
	if strings.Contains(suggested, "pod-template-hash") || strings.Contains(suggested, "ipBlock") {
		t.Errorf("suggested is\n%s", suggested)
	}
	var list networkingv1.NetworkPolicyList
	l.json(0, &list, "suggest")
	if len(list.Items) != 2 || list.Kind != "NetworkPolicyList" {
		t.Errorf("as JSON it is %v", list)
	}
	// What hubble writes into a file says the same.
	file := filepath.Join(t.TempDir(), "flows.json")
	var lines strings.Builder
	for _, f := range getFlows(t, c, &observerpb.GetFlowsRequest{}) {
		b, err := protojson.Marshal(&observerpb.GetFlowsResponse{ResponseTypes: &observerpb.GetFlowsResponse_Flow{Flow: f}})
		if err != nil {
			t.Fatal(err)
		}
		lines.Write(append(b, '\n'))
	}
	if err := os.WriteFile(file, []byte(lines.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := l.ok(0, "suggest", "--file", file); got != suggested {
		t.Errorf("from a file\n%s\nfrom the observer\n%s", got, suggested)
	}

	l.write("suggested.yaml", suggested)
	l.write("pods.yaml", strings.ReplaceAll(pods, "AUDIT", "false"))
	l.until("closed", func() bool { return !l.reaches("stranger", "web") })
	if !l.reaches("client", "web") {
		t.Error("what was seen is not allowed")
	}
}

func TestSuggestFaults(t *testing.T) {
	file := filepath.Join(t.TempDir(), "flows.json")
	if err := os.WriteFile(file, []byte("\n{\"flow\": {}}\nnonsense\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		args []string
		want string
	}{
		"no file":       {[]string{"--file", file + ".not"}, "no such file"},
		"broken file":   {[]string{"--file", file}, "flows.json:3: "},
		"file or watch": {[]string{"--file", file, "--watch", "1s"}, "none of the others can be"},
		"output":        {[]string{"-o", "xml"}, `"xml" is not one of [text json yaml]`},
	} {
		t.Run(name, func(t *testing.T) {
			a, out := testApp(nil)
			if code := run(t.Context(), a.env, append([]string{"suggest"}, test.args...)); code != 1 || !strings.Contains(out.String(), test.want) {
				t.Errorf("exit code %d, %q", code, out)
			}
		})
	}
	a, out := testApp(nil)
	if code := run(t.Context(), a.env, []string{"status", "-o", "yaml"}); code != 1 {
		t.Errorf("status -o yaml: exit code %d, %s", code, out)
	}
	var list networkingv1.NetworkPolicyList
	a, out = testApp(nil)
	a.Stdin, a.Stderr = strings.NewReader(""), &strings.Builder{}
	if code := run(t.Context(), a.env, []string{"suggest", "--file", "-", "-o", "json"}); code != 0 || json.Unmarshal(out.Bytes(), &list) != nil || list.Items == nil {
		t.Errorf("nothing: exit code %d, %s", code, out)
	}
}
