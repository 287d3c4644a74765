// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podgate/podgate/syncd/apiserver"
	"github.com/podgate/podgate/syncd/status"
	"github.com/podgate/podgate/test/need"
)

const (
	podManifests = `
apiVersion: v1
kind: Pod
metadata: {namespace: shop, name: client, labels: {app: client}}
---
apiVersion: v1
kind: Pod
metadata: {namespace: shop, name: web, labels: {app: web}}
`
	allowClient = `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {namespace: shop, name: web}
spec:
  podSelector: {matchLabels: {app: web}}
  ingress:
  - from: [{podSelector: {matchLabels: {app: client}}}]
    ports: [{port: 80}]
`
)

func TestNode(t *testing.T) {
	l := newLab(t)
	code, _, errs := l.run("status")
	if code != 1 || !strings.Contains(errs, "not set up") || !strings.Contains(errs, "podgate init") {
		t.Errorf("status of nothing: exit code %d, %s", code, errs)
	}
	l.ok(0, "init")
	l.ok(0, "init")
	if r := l.status(); !hasProblem(r, "podgate sync has never run") {
		t.Errorf("problems %v", r.Problems)
	}

	l.write("pods.yaml", podManifests)
	d := l.sync("--metrics", "127.0.0.1:9099")
	l.until("synced", func() bool { r := l.status(); return r.Daemon != nil && !r.Daemon.Synced.IsZero() })
	for _, name := range []string{"client", "web", "other"} {
		l.addPod(name)
	}
	l.listen("web")
	l.until("open", func() bool {
		s := states(l.status())
		return s["shop/client"] == "open" && s["shop/web"] == "open" && s["shop/other"] == "open"
	})
	if r := l.status(); len(r.Problems) > 0 {
		t.Errorf("problems %v", r.Problems)
	}
	if !l.reaches("client", "web") || !l.reaches("other", "web") {
		t.Fatal("pods without policy do not reach each other")
	}

	l.write("web.yaml", allowClient)
	l.until("enforcing", func() bool { return states(l.status())["shop/web"] == "enforcing" })
	l.ok(0, "flows") // empties the ring
	if !l.reaches("client", "web") || l.reaches("other", "web") {
		t.Error("policy is not what is enforced")
	}
	t.Run("flows", func(t *testing.T) { testFlows(t, l) })
	t.Run("policy", func(t *testing.T) { testPolicy(t, l) })
	t.Run("explain", func(t *testing.T) { testExplain(t, l) })
	t.Run("metrics", func(t *testing.T) {
		body := l.get(t, "127.0.0.1:9099", "/metrics")
		for _, want := range []string{
			`podgate_sync_objects{kind="endpoint"} 3`, `podgate_endpoints{state="enforcing"} 1`,
			`podgate_map_max_entries{map="endpoints"} `, `podgate_map_entries{map="endpoints"} `,
		} {
			if !strings.Contains(body, want) {
				t.Errorf("no %s in metrics:\n%s", want, body)
			}
		}
		for _, path := range []string{"/healthz", "/readyz"} {
			if body := l.get(t, "127.0.0.1:9099", path); body != "ok\n" {
				t.Errorf("%s: %s", path, body)
			}
		}
	})

	// A broken file changes nothing, and is named.
	l.write("web.yaml", strings.Replace(allowClient, "ingress:", "ingres:", 1))
	named := filepath.Join(l.dir, "web.yaml") + `:7: NetworkPolicy shop/web: unknown field "spec.ingres"`
	l.until("named", func() bool { return hasProblem(l.status(), named) })
	if !strings.Contains(d.logged(), "web.yaml") || !strings.Contains(l.get(t, "127.0.0.1:9099", "/metrics"), `podgate_sync_problems{subject="`+filepath.Join(l.dir, "web.yaml")) {
		t.Error("the broken file is missing in the log or in the metrics")
	}
	if !l.reaches("client", "web") || l.reaches("other", "web") {
		t.Error("a broken file changed what is enforced")
	}

	// Enforcement outlives the daemon.
	if code, _, errs := l.run("sync", "--policy-dir", l.dir, "--once"); code != 1 || !strings.Contains(errs, "another podgate sync is running") {
		t.Errorf("second daemon: exit code %d, %s", code, errs)
	}
	d.end(t, unix.SIGKILL)
	if r := l.status(); !hasProblem(r, "podgate sync is not running") || r.Daemon.Running {
		t.Errorf("after kill -9: %+v", r.Daemon)
	}
	if !l.reaches("client", "web") || l.reaches("other", "web") {
		t.Error("the daemon's death changed what is enforced")
	}

	// What the manifests say and the kernel was never told is loud.
	l.write("more.yaml", strings.ReplaceAll(allowClient, "web", "client"))
	question := []string{"--from", "shop/other", "--to", "shop/client", "--port", "80/TCP"}
	var x explanation
	l.json(2, &x, append([]string{"explain"}, question...)...)
	if !x.Disagree || x.Verdict != "allow" {
		t.Errorf("explanation %+v", x)
	}
	if out := l.ok(2, append([]string{"explain"}, question...)...); !strings.Contains(out, "COMPILER AND KERNEL DISAGREE") {
		t.Errorf("explanation:\n%s", out)
	}
	if out := l.ok(2, "matrix", "--ports", "80"); !strings.Contains(out, "allow !!") {
		t.Errorf("matrix:\n%s", out)
	}
	if err := os.Remove(filepath.Join(l.dir, "more.yaml")); err != nil {
		t.Fatal(err)
	}

	// So does the last good version of the file that is still broken.
	d = l.sync()
	l.until("named", func() bool { r := l.status(); return r.Daemon.Running && hasProblem(r, named) })
	if !l.reaches("client", "web") || l.reaches("other", "web") {
		t.Error("a restart beside a broken file changed what is enforced")
	}
	if err := os.Remove(filepath.Join(l.dir, "web.yaml")); err != nil {
		t.Fatal(err)
	}
	l.until("open", func() bool { return states(l.status())["shop/web"] == "open" })
	if !l.reaches("other", "web") {
		t.Error("the removed policy is still enforced")
	}
	d.end(t, unix.SIGTERM)

	l.write("web.yaml", allowClient)
	l.ok(0, "sync", "--policy-dir", l.dir, "--once")
	if l.reaches("other", "web") || !l.reaches("client", "web") {
		t.Error("--once did not apply the directory")
	}
	if r := l.status(); len(r.Problems) > 0 || !r.Daemon.Once {
		t.Errorf("after --once: problems %v", r.Problems)
	}
	l.write("pods.yaml", "nonsense: [")
	if out := l.ok(2, "sync", "--policy-dir", l.dir, "--once"); out != "" {
		t.Errorf("--once prints %q", out)
	}
	t.Run("repair", func(t *testing.T) { testRepair(t, l) })
	t.Run("gc", func(t *testing.T) { testGC(t, l) })
}

func (l *lab) get(t *testing.T, addr, path string) (body string) {
	t.Helper()
	err := l.node.Do(func() error {
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			return err
		}
		client := http.Client{Transport: &http.Transport{
			DialContext: func(context.Context, string, string) (net.Conn, error) { return conn, nil },
		}}
		resp, err := client.Get("http://" + addr + path)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		data, err := io.ReadAll(resp.Body)
		body = string(data)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return body
}

func testFlows(t *testing.T, l *lab) {
	var denied, allowed *flowReport
	lines := strings.Split(strings.TrimSpace(l.ok(0, "flows", "--pod", "shop/web", "--port", "80", "-o", "json")), "\n")
	for _, line := range lines {
		var r flowReport
		if err := json.Unmarshal([]byte(line), &r); err != nil {
			t.Fatalf("%v: %s", err, line)
		}
		switch {
		case r.Verdict == "denied" && r.Peer == "shop/other":
			denied = &r
		case r.Verdict == "allowed" && r.Peer == "shop/client":
			allowed = &r
		}
	}
	if denied == nil || denied.Policy != "NetworkPolicy shop/web" || denied.Direction != "ingress" || denied.Detail != "SYN" {
		t.Errorf("drop %+v in\n%s", denied, strings.Join(lines, "\n"))
	}
	if allowed == nil || !strings.Contains(allowed.Rule, "from pods app=client in namespace shop on 80/TCP") {
		t.Errorf("flow %+v in\n%s", allowed, strings.Join(lines, "\n"))
	}
	if out := l.ok(0, "flows"); out != "" {
		t.Errorf("flows were not taken: %s", out)
	}
	testFlowsEnd(t, l)
	out := l.ok(0, "flows", "list", "--pod", "shop/web", "--peer", "shop/client")
	if !strings.Contains(out, "NetworkPolicy shop/web") {
		t.Errorf("list:\n%s", out)
	}

	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	follow := l.command(ctx, "flows", "--follow", "--verdict", "denied")
	stdout, err := follow.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := l.node.Do(follow.Start); err != nil {
		t.Fatal(err)
	}
	found := make(chan string, 1)
	go func() {
		var seen []byte
		buf := make([]byte, 4096)
		for !bytes.Contains(seen, []byte("shop/other")) {
			n, err := stdout.Read(buf)
			if seen = append(seen, buf[:n]...); err != nil {
				break
			}
		}
		found <- string(seen)
	}()
	var line string
	for line == "" {
		l.reaches("other", "web")
		select {
		case line = <-found:
		case <-ctx.Done():
			t.Fatal("nothing followed")
		default:
		}
	}
	if !strings.Contains(line, "denied  ingress shop/other") || !strings.Contains(line, "(NetworkPolicy shop/web: isolated, no rule matched)") {
		t.Errorf("followed %q", line)
	}
	if err := follow.Process.Signal(unix.SIGINT); err != nil {
		t.Fatal(err)
	}
	if err := follow.Wait(); err != nil {
		t.Errorf("flows --follow: %v", err)
	}
}

// testFlowsEnd asks that what there was is shown although more comes all the
// time.
func testFlowsEnd(t *testing.T, l *lab) {
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() {
		ended <- l.pods["other"].Do(func() error {
			for port := 1024; ctx.Err() == nil; port = 1024 + port%60000 {
				conn, err := net.Dial("udp", net.JoinHostPort(l.addrs["web"][0], strconv.Itoa(port)))
				if err != nil {
					return err
				}
				_, err = conn.Write([]byte("x"))
				if err = errors.Join(err, conn.Close()); err != nil {
					return err
				}
				time.Sleep(10 * time.Millisecond)
			}
			return nil
		})
	}()
	l.ok(0, "flows")
	stop()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

func testPolicy(t *testing.T, l *lab) {
	var reports []policyReport
	l.json(0, &reports, "policy", "shop/web")
	if len(reports) != 1 {
		t.Fatalf("reports %+v", reports)
	}
	r := reports[0].Ingress
	if r.State != "enforcing" || r.Default != "deny" || len(r.Policies) != 1 || len(r.Policies[0].Rules) != 1 || r.Policies[0].Isolation == nil {
		t.Fatalf("ingress %+v", r)
	}
	if rule := r.Policies[0].Rules[0]; rule.Text != "from pods app=client in namespace shop on 80/TCP" || rule.Packets == 0 {
		t.Errorf("rule %+v", rule)
	}
	if r.Policies[0].Isolation.Packets == 0 || reports[0].Egress.State != "open" {
		t.Errorf("isolation %+v, egress %+v", r.Policies[0].Isolation, reports[0].Egress)
	}
	code, _, errs := l.run("policy", "shop/nobody")
	if code != 1 || !strings.Contains(errs, "podgate status") {
		t.Errorf("unknown pod: exit code %d, %s", code, errs)
	}
	if out := l.ok(0, "policy"); !strings.Contains(out, "shop/client") || !strings.Contains(out, "ingress: open, no policy applies") {
		t.Errorf("policy:\n%s", out)
	}
}

func testExplain(t *testing.T, l *lab) {
	for _, tt := range []struct{ from, to, port, verdict string }{
		{"shop/client", "shop/web", "80/TCP", "allow"},
		{"shop/other", "shop/web", "80/TCP", "deny"},
		{"shop/client", "shop/web", "81/TCP", "deny"},
		{"shop/web", "shop/other", "80/TCP", "allow"},
		{"203.0.113.1", "shop/web", "80/TCP", "deny"},
		{"10.71.0.1", "shop/web", "80/TCP", "allow"},
		{"shop/web", "10.71.0.1", "80/TCP", "allow"},
	} {
		var x explanation
		l.json(0, &x, "explain", "--from", tt.from, "--to", tt.to, "--port", tt.port)
		if x.Verdict != tt.verdict || len(x.Caveats) > 0 {
			t.Errorf("%s to %s on %s: %s, want %s; caveats %v", tt.from, tt.to, tt.port, x.Verdict, tt.verdict, x.Caveats)
		}
		for _, p := range x.Paths {
			for _, s := range p.Sides {
				if s.Kernel == nil && !strings.Contains(s.Unasked, "own node") {
					t.Errorf("%s to %s: the kernel was not asked: %s", tt.from, tt.to, s.Unasked)
				}
			}
		}
	}
	// Without the daemon's status nobody knows where the manifests are.
	var alone explanation
	l.json(0, &alone, "explain", "--from", "shop/other", "--to", "shop/web", "--port", "80/TCP", "--run-dir", t.TempDir())
	if alone.Verdict != "deny" || len(alone.Caveats) != 1 || !strings.HasPrefix(alone.Caveats[0], "only the kernel answered") {
		t.Errorf("without manifests: %+v", alone)
	}
	// Nor can what a pod of the cluster follows be asked from outside.
	run, err := status.Acquire(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer run.Close()
	if err := run.Write(status.Status{Origin: status.Origin{Node: "n1", Kubeconfig: apiserver.InCluster}}); err != nil {
		t.Fatal(err)
	}
	alone = explanation{}
	l.json(0, &alone, "explain", "--from", "shop/other", "--to", "shop/web", "--port", "80/TCP", "--run-dir", run.Path())
	if alone.Verdict != "deny" || len(alone.Caveats) != 1 || !strings.Contains(alone.Caveats[0], "for pods of the cluster") {
		t.Errorf("outside of the cluster: %+v", alone)
	}

	var m matrixReport
	l.json(0, &m, "matrix", "--ports", "TCP/80,UDP/53", "--address", "203.0.113.1")
	verdicts := make(map[string]string)
	for _, c := range m.Cells {
		verdicts[fmt.Sprintf("%s>%s %s", c.From, c.To, c.Port)] = c.Verdict
	}
	if len(m.Cells) != 2*4*4 || verdicts["shop/client>shop/web 80/TCP"] != "allow" || verdicts["shop/other>shop/web 80/TCP"] != "deny" ||
		verdicts["shop/client>shop/web 53/UDP"] != "deny" || verdicts["203.0.113.1>203.0.113.1 80/TCP"] != "-" {
		t.Errorf("matrix %v", verdicts)
	}
}

func testRepair(t *testing.T, l *lab) {
	if out := l.ok(0, "repair"); out != "nothing to repair\n" {
		t.Errorf("repair prints %q", out)
	}
	need.Tools(t, "tc")
	out, err := l.node.Exec(t.Context(), "tc", "qdisc", "show")
	if err != nil {
		t.Fatal(err)
	}
	lost := ""
	for _, e := range l.status().Endpoints {
		if e.Name == "shop/web" {
			lost = e.HostInterface
		}
	}
	if _, err := l.node.Exec(t.Context(), "tc", "qdisc", "del", "dev", lost, "clsact"); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if r := l.status(); !hasProblem(r, "endpoint shop/web") {
		t.Errorf("problems %v", r.Problems)
	}
	if out := l.ok(0, "repair"); !strings.Contains(out, "attached again") {
		t.Errorf("repair prints %q", out)
	}
	if l.reaches("other", "web") {
		t.Error("not enforced after the repair")
	}
}

func testGC(t *testing.T, l *lab) {
	if code, _, errs := l.run("gc", "--network", "pods"); code != 1 || !strings.Contains(errs, "--all") {
		t.Errorf("gc without --keep: exit code %d, %s", code, errs)
	}
	keep := []string{"gc", "--network", "pods"}
	for _, name := range []string{"client", "web"} {
		keep = append(keep, "--keep", l.pods[name].ID+"/eth0")
	}
	if out := l.ok(0, keep...); strings.TrimSpace(out) != l.pods["other"].ID+"/eth0" {
		t.Errorf("gc removed %q", out)
	}
	if s := states(l.status()); len(s) != 2 {
		t.Errorf("endpoints %v", s)
	}
}
