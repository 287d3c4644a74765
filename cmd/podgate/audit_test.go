// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestAudit asks that audit mode begins and ends with its annotation, also for
// a pod that had it before it was attached.
func TestAudit(t *testing.T) {
	const isolated = `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {namespace: shop, name: none}
spec: {podSelector: {matchLabels: {app: web}}}
---
apiVersion: v1
kind: Pod
metadata: {namespace: shop, name: web, uid: uid-web, labels: {app: web}, annotations: {podgate.io/audit: "AUDIT"}}
---
apiVersion: v1
kind: Namespace
metadata: {name: shop, annotations: {podgate.io/audit: "NAMESPACE"}}
`
	l := newLab(t)
	manifest := func(pod, namespace string) {
		l.write("web.yaml", strings.NewReplacer("AUDIT", pod, "NAMESPACE", namespace).Replace(isolated))
	}
	manifest("true", "false")
	d := l.sync("--audit-pods")
	l.until("synced", func() bool {
		r := l.status()
		return r.Daemon != nil && r.Daemon.Pods == 1 && !r.Daemon.Synced.IsZero()
	})
	l.addPod("web")
	l.addPod("client")
	l.listen("web")
	reached := func(families int) func() bool {
		return func() bool { return l.answers("client", "web") == families }
	}
	l.until("audited", reached(2))
	if out := l.ok(0, "flows", "--verdict", "audited"); !strings.Contains(out, "NetworkPolicy shop/none: isolated, no rule matched") {
		t.Errorf("flows:\n%s", out)
	}
	var x explanation
	l.json(0, &x, "explain", "--from", "shop/client", "--to", "shop/web", "--port", "80")
	if x.Verdict != "audit" {
		t.Errorf("verdict %s", x.Verdict)
	}
	manifest("false", "false")
	l.until("denied", reached(0))
	manifest("true", "false")
	l.until("audited", reached(2))

	// Without the switch a pod cannot do that for itself.
	d.end(t, unix.SIGTERM)
	l.sync()
	l.until("denied", reached(0))
	l.until("named", func() bool { return hasProblem(l.status(), "Pod shop/web: annotation podgate.io/audit has no effect") })
	l.json(2, &x, "explain", "--from", "shop/client", "--to", "shop/web", "--port", "80")
	if x.Verdict != "deny" || x.Disagree {
		t.Errorf("verdict %s, disagree %v", x.Verdict, x.Disagree)
	}
	l.json(0, &x, "explain", "--from", "203.0.113.1", "--to", "shop/web", "--port", "80", "--policy-dir", l.dir, "--audit-pods")
	if x.Verdict != "audit" {
		t.Errorf("verdict with --audit-pods %s", x.Verdict)
	}
	manifest("false", "true")
	l.until("audited", reached(2))
	manifest("false", "false")
	l.until("denied", reached(0))
}
