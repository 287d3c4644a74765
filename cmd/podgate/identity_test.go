// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"strings"
	"testing"

	"github.com/podgate/podgate/test/netlab"
)

// TestContainersWithoutPods gates containers of a runtime that has no pods: they
// go by the labels of args.cni, in the namespace default.
func TestContainersWithoutPods(t *testing.T) {
	l := newLab(t)
	l.write("web.yaml", `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web}
spec:
  podSelector: {matchLabels: {app: web}}
  ingress:
  - from: [{podSelector: {matchLabels: {app: client}}}]
  - from: [{podSelector: {matchLabels: {app: elsewhere}}, namespaceSelector: {matchLabels: {team: red}}}]
`)
	l.write("elsewhere.yaml", `
apiVersion: v1
kind: Namespace
metadata: {name: red, labels: {team: red}}
---
apiVersion: v1
kind: Pod
metadata: {namespace: red, name: a, labels: {app: elsewhere}}
spec: {nodeName: n2}
status: {podIPs: [{ip: 10.72.0.1}, {ip: "fd72::1"}]}
---
apiVersion: v1
kind: Pod
metadata: {namespace: blue, name: a, labels: {app: elsewhere}}
spec: {nodeName: n2}
status: {podIPs: [{ip: 10.72.0.2}]}
`)
	l.sync()
	l.add("web", netlab.PodSpec{ID: "webwebweb", Labels: map[string]string{"app": "web"}})
	l.add("client", netlab.PodSpec{ID: "clientclient", Labels: map[string]string{"app": "client"}})
	l.add("other", netlab.PodSpec{ID: "otherother"})
	l.listen("web")
	l.until("enforcing", func() bool {
		s := states(l.status())
		return s["webwebweb"] == "enforcing" && s["clientclient"] == "open" && s["otherother"] == "open"
	})
	if !l.reaches("client", "web") || l.reaches("other", "web") {
		t.Error("labels are not what is enforced")
	}
	for from, verdict := range map[string]string{
		"red/a": "allow", "blue/a": "deny", "clientclient": "allow", "default/otherother": "deny",
		"10.72.0.1": "allow", "fd72::1": "allow", "10.72.0.3": "deny",
	} {
		var x explanation
		l.json(0, &x, "explain", "--from", from, "--to", "webwebweb", "--port", "80")
		if x.Verdict != verdict {
			t.Errorf("%s: %s, want %s: %+v", from, x.Verdict, verdict, x.Paths)
		}
	}
	if out := l.ok(0, "policy", "webweb"); !strings.HasPrefix(out, "webwebweb\n  ingress: enforcing") {
		t.Errorf("policy:\n%s", out)
	}
}
