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
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podgate/podgate/test/netlab"
)

// asPodgate makes the test binary be podgate, so that commands run as processes
// of their own in a node's network namespace.
const asPodgate = "PODGATE_TEST_AS_PODGATE"

func TestMain(m *testing.M) {
	if os.Getenv(asPodgate) != "" {
		main()
	}
	os.Exit(m.Run())
}

// lab is a node with a policy directory and three pods to be.
type lab struct {
	t      *testing.T
	node   *netlab.Node
	list   netlab.Conflist
	dir    string
	runDir string
	pods   map[string]*netlab.Pod
	addrs  map[string][]string
}

func newLab(t *testing.T) *lab {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("network namespaces and bpffs need root")
	}
	plugins := t.TempDir()
	if err := netlab.Build(t.Context(), plugins); err != nil {
		t.Fatal(err)
	}
	node, err := netlab.New(netlab.Options{Plugins: plugins})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := node.Close(); err != nil {
			t.Error(err)
		}
	})
	l := &lab{
		t: t, node: node, dir: filepath.Join(node.Dir, "policies"), runDir: filepath.Join(node.Dir, "run"),
		list: netlab.Conflist{CNIVersion: "1.1.0", Name: "pods", Plugins: []netlab.Plugin{
			node.Bridge("br0", "10.71.0.0/24", "fd71::/64"), node.Podgate(),
		}},
		pods: make(map[string]*netlab.Pod), addrs: make(map[string][]string),
	}
	if err := os.Mkdir(l.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return l
}

// command is podgate in the node.
func (l *lab) command(ctx context.Context, args ...string) *exec.Cmd {
	l.t.Helper()
	self, err := os.Executable()
	if err != nil {
		l.t.Fatal(err)
	}
	cmd := exec.CommandContext(ctx, self, append([]string{"--bpffs", l.node.BPFFS, "--run-dir", l.runDir}, args...)...)
	cmd.Env = append(os.Environ(), asPodgate+"=1")
	return cmd
}

// run runs podgate in the node to its end.
func (l *lab) run(args ...string) (code int, stdout, stderr string) {
	l.t.Helper()
	ctx, cancel := context.WithTimeout(l.t.Context(), time.Minute)
	defer cancel()
	cmd := l.command(ctx, args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := l.node.Do(cmd.Run)
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		l.t.Fatalf("podgate %v: %v", args, err)
	}
	return cmd.ProcessState.ExitCode(), out.String(), errs.String()
}

// ok runs podgate and wants an exit code.
func (l *lab) ok(want int, args ...string) string {
	l.t.Helper()
	code, stdout, stderr := l.run(args...)
	if code != want {
		l.t.Fatalf("podgate %v: exit code %d, want %d\n%s%s", args, code, want, stdout, stderr)
	}
	return stdout
}

// json runs podgate for JSON.
func (l *lab) json(want int, into any, args ...string) {
	l.t.Helper()
	out := l.ok(want, append(args, "-o", "json")...)
	if err := json.Unmarshal([]byte(out), into); err != nil {
		l.t.Fatalf("podgate %v: %v\n%s", args, err, out)
	}
}

// daemon is a running podgate sync.
type daemon struct {
	cmd *exec.Cmd
	mu  sync.Mutex
	log bytes.Buffer
}

func (d *daemon) Write(p []byte) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.log.Write(p)
}

func (d *daemon) logged() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.log.String()
}

// sync starts the daemon.
func (l *lab) sync(args ...string) *daemon {
	l.t.Helper()
	d := &daemon{cmd: l.command(context.Background(), append([]string{"sync", "--policy-dir", l.dir, "--node-name", "n1"}, args...)...)}
	d.cmd.Stderr = d
	if err := l.node.Do(d.cmd.Start); err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() {
		d.end(l.t, unix.SIGKILL)
		if l.t.Failed() {
			l.t.Logf("daemon:\n%s", d.logged())
		}
	})
	return d
}

func (d *daemon) end(t *testing.T, how os.Signal) {
	t.Helper()
	if d.cmd.ProcessState != nil {
		return
	}
	if err := d.cmd.Process.Signal(how); err != nil {
		t.Error(err)
	}
	err := d.cmd.Wait()
	if how == unix.SIGTERM && err != nil {
		t.Errorf("daemon: %v", err)
	}
}

// write puts a manifest in place.
func (l *lab) write(name, text string) {
	l.t.Helper()
	path := filepath.Join(l.dir, name)
	if err := os.WriteFile(path+".tmp", []byte(text), 0o600); err != nil {
		l.t.Fatal(err)
	}
	if err := os.Rename(path+".tmp", path); err != nil {
		l.t.Fatal(err)
	}
}

func (l *lab) addPod(name string) {
	l.t.Helper()
	pod, result, err := l.node.AddPod(l.t.Context(), l.list, netlab.PodSpec{Namespace: "shop", Name: name, UID: "uid-" + name})
	if err != nil {
		l.t.Fatal(err)
	}
	l.pods[name] = pod
	for _, ip := range result.IPs {
		l.addrs[name] = append(l.addrs[name], ip.Address.IP.String())
	}
	l.t.Cleanup(func() {
		if err := l.node.DelPod(context.Background(), pod); err != nil {
			l.t.Error(err)
		}
	})
}

// listen serves TCP on port 80 of a pod, echoing.
func (l *lab) listen(pod string) {
	l.t.Helper()
	err := l.pods[pod].Do(func() error {
		listener, err := net.Listen("tcp", ":80")
		if err != nil {
			return err
		}
		l.t.Cleanup(func() { listener.Close() })
		go func() {
			for {
				c, err := listener.Accept()
				if err != nil {
					return
				}
				go func() {
					defer c.Close()
					_, _ = io.Copy(c, c)
				}()
			}
		}()
		return nil
	})
	if err != nil {
		l.t.Fatal(err)
	}
}

// reaches tells whether one pod gets an answer from another, over both
// families.
func (l *lab) reaches(from, to string) bool {
	l.t.Helper()
	answers := 0
	for _, addr := range l.addrs[to] {
		err := l.pods[from].Do(func() error {
			c, err := net.DialTimeout("tcp", net.JoinHostPort(addr, "80"), 300*time.Millisecond)
			if err != nil {
				return err
			}
			return c.Close()
		})
		if err == nil {
			answers++
		}
	}
	if answers != 0 && answers != len(l.addrs[to]) {
		l.t.Errorf("%s reaches %s over one family only", from, to)
	}
	return answers > 0
}

// until waits for a condition.
func (l *lab) until(what string, ok func() bool) {
	l.t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			_, out, errs := l.run("status")
			l.t.Fatalf("not %s\n%s%s", what, out, errs)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func (l *lab) status() statusReport {
	l.t.Helper()
	code, out, errs := l.run("status", "-o", "json")
	var r statusReport
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		l.t.Fatalf("status: %v\n%s%s", err, out, errs)
	}
	if (code == 2) != (len(r.Problems) > 0) {
		l.t.Errorf("status: exit code %d with problems %v", code, r.Problems)
	}
	return r
}

// states of the endpoints by name.
func states(r statusReport) map[string]string {
	out := make(map[string]string)
	for _, e := range r.Endpoints {
		out[e.Name] = e.State
	}
	return out
}

func hasProblem(r statusReport, text string) bool {
	for _, p := range r.Problems {
		if strings.Contains(p.Subject+": "+p.Reason, text) {
			return true
		}
	}
	return false
}

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
		if body := l.metrics(t, "127.0.0.1:9099"); !strings.Contains(body, `podgate_sync_objects{kind="endpoint"} 3`) {
			t.Errorf("metrics:\n%s", body)
		}
	})

	// A broken file changes nothing, and is named.
	l.write("web.yaml", strings.Replace(allowClient, "ingress:", "ingres:", 1))
	named := filepath.Join(l.dir, "web.yaml") + `:7: NetworkPolicy shop/web: unknown field "spec.ingres"`
	l.until("named", func() bool { return hasProblem(l.status(), named) })
	if !strings.Contains(d.logged(), "web.yaml") || !strings.Contains(l.metrics(t, "127.0.0.1:9099"), `podgate_sync_problems{subject="`+filepath.Join(l.dir, "web.yaml")) {
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

func (l *lab) metrics(t *testing.T, addr string) (body string) {
	t.Helper()
	err := l.node.Do(func() error {
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			return err
		}
		client := http.Client{Transport: &http.Transport{
			DialContext: func(context.Context, string, string) (net.Conn, error) { return conn, nil },
		}}
		resp, err := client.Get("http://" + addr + "/metrics")
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
