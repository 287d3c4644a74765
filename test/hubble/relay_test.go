// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package hubble

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"github.com/podgate/podgate/test/netlab"
)

const policies = `
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, uid: uid-web, labels: {app: web}}
spec: {nodeName: NODE}
---
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: shop, uid: uid-client, labels: {app: client}}
spec: {nodeName: NODE}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: only-client, namespace: shop}
spec:
  podSelector: {matchLabels: {app: web}}
  ingress: [{from: [{podSelector: {matchLabels: {app: client}}}], ports: [{port: 80}]}]
`

// node is one with pods, podgate sync and podgate observe.
type node struct {
	t    *testing.T
	name string
	*netlab.Node
	podgate string
	run     string
	pods    map[string]*netlab.Pod
	web     string
}

// build builds what the nodes run.
func build(t *testing.T) (plugins, podgate string) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("network namespaces and bpffs need root")
	}
	plugins = t.TempDir()
	t.Chdir(filepath.Join("..", "..")) // the module of what is built
	if err := netlab.Build(t.Context(), plugins); err != nil {
		t.Fatal(err)
	}
	podgate = filepath.Join(plugins, "podgate")
	cmd := exec.CommandContext(t.Context(), "go", "build", "-o", podgate, "./cmd/podgate")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return plugins, podgate
}

func newNode(t *testing.T, name, plugins, podgate string) *node {
	t.Helper()
	n, err := netlab.New(netlab.Options{Plugins: plugins})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	})
	out := &node{t: t, name: name, Node: n, podgate: podgate, run: filepath.Join(n.Dir, "run"), pods: make(map[string]*netlab.Pod)}
	dir := filepath.Join(n.Dir, "policies")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "shop.yaml"), []byte(strings.ReplaceAll(policies, "NODE", name)), 0o600); err != nil {
		t.Fatal(err)
	}
	out.start("sync", "--policy-dir", dir)
	out.until("synced", func() bool { return out.command("status", "-o", "json").Run() == nil })
	list := netlab.Conflist{CNIVersion: "1.1.0", Name: "pods", Plugins: []netlab.Plugin{n.Bridge("br0", "10.71.0.0/24"), n.Podgate()}}
	for _, pod := range []string{"web", "client", "stranger"} {
		p, result, err := n.AddPod(t.Context(), list, netlab.PodSpec{Namespace: "shop", Name: pod, UID: "uid-" + pod})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := n.DelPod(context.Background(), p); err != nil {
				t.Error(err)
			}
		})
		if out.pods[pod] = p; pod == "web" {
			out.web = result.IPs[0].Address.IP.String()
		}
	}
	if err := out.pods["web"].Do(func() error {
		l, err := net.Listen("tcp", ":80")
		if err != nil {
			return err
		}
		t.Cleanup(func() { l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				c.Close()
			}
		}()
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return out
}

func (n *node) command(args ...string) *exec.Cmd {
	return exec.CommandContext(n.t.Context(), n.podgate, append([]string{"--bpffs", n.BPFFS, "--run-dir", n.run}, args...)...)
}

// start starts podgate to stay until the end of the test.
func (n *node) start(args ...string) {
	n.t.Helper()
	n.stay(n.command(append(args, "--node-name", n.name)...))
}

func (n *node) stay(cmd *exec.Cmd) {
	n.t.Helper()
	var log bytes.Buffer
	cmd.Stderr = &log
	if err := n.Do(cmd.Start); err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if n.t.Failed() {
			n.t.Logf("%s:\n%s", cmd.Args[1], log.String())
		}
	})
}

func (n *node) until(what string, ok func() bool) {
	n.t.Helper()
	for deadline := time.Now().Add(time.Minute); !ok(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			n.t.Fatalf("%s: not %s", n.name, what)
		}
	}
}

// connect tries to reach web.
func (n *node) connect(from string) bool {
	return n.pods[from].Do(func() error {
		c, err := net.DialTimeout("tcp", net.JoinHostPort(n.web, "80"), 200*time.Millisecond)
		if err != nil {
			return err
		}
		return c.Close()
	}) == nil
}

func (n *node) socket() string { return "unix://" + filepath.Join(n.run, "hubble.sock") }

// observed is a line of "hubble observe -o json".
type observed struct {
	Flow struct {
		Verdict  string `json:"verdict"`
		NodeName string `json:"node_name"`
		Source   struct {
			Pod string `json:"pod_name"`
		} `json:"source"`
		Destination struct {
			Pod string `json:"pod_name"`
		} `json:"destination"`
		DeniedBy []struct {
			Name string `json:"name"`
		} `json:"ingress_denied_by"`
	} `json:"flow"`
}

// observe runs "hubble observe" and answers its flows.
func (n *node) observe(server string, args ...string) (flows []observed) {
	n.t.Helper()
	out, err := output(n.t, n.Do, append([]string{"observe", "--server", server, "-o", "json", "--last", "1000"}, args...)...)
	if err != nil {
		n.t.Fatal(err)
	}
	for dec := json.NewDecoder(strings.NewReader(out)); ; {
		var o observed
		if err := dec.Decode(&o); err == io.EOF {
			return flows
		} else if err != nil {
			n.t.Fatalf("%v in\n%s", err, out)
		}
		flows = append(flows, o)
	}
}

// The command line, unmodified, asks podgate observe in all the ways it has.
func TestCommandLine(t *testing.T) {
	plugins, podgate := build(t)
	n := newNode(t, "n1", plugins, podgate)
	n.start("observe")
	n.until("policy enforced, and seen", func() bool {
		if _, err := os.Stat(filepath.Join(n.run, "hubble.sock")); err != nil {
			return false
		}
		return n.connect("client") && !n.connect("stranger") && len(n.observe(n.socket(), "--verdict", "DROPPED", "--to-pod", "shop/web")) > 0
	})
	for _, test := range []struct {
		filter string
		want   func(o *observed) bool
		none   bool
	}{
		{filter: "--verdict DROPPED", want: func(o *observed) bool { return o.Flow.Verdict == "DROPPED" }},
		{filter: "--verdict DROPPED --to-pod shop/web --from-pod shop/stranger", want: func(o *observed) bool {
			return o.Flow.Source.Pod == "stranger" && len(o.Flow.DeniedBy) == 1 && o.Flow.DeniedBy[0].Name == "only-client"
		}},
		{filter: "--pod shop/client", want: func(o *observed) bool { return o.Flow.Source.Pod == "client" || o.Flow.Destination.Pod == "client" }},
		{filter: "--from-label app=client --protocol tcp", want: func(o *observed) bool { return o.Flow.Source.Pod == "client" }},
		{filter: "--namespace shop --to-port 80 --protocol tcp", want: func(o *observed) bool { return o.Flow.Destination.Pod == "web" }},
		{filter: "--traffic-direction ingress --to-label app=web", want: func(o *observed) bool { return o.Flow.Destination.Pod == "web" }},
		{filter: "--type drop", want: func(o *observed) bool { return o.Flow.Verdict == "DROPPED" }},
		{filter: "--not --verdict DROPPED --to-pod shop/web", want: func(o *observed) bool { return o.Flow.Verdict == "FORWARDED" }},
		{filter: "--node-name n1 --ipv4 --to-pod shop/web", want: func(o *observed) bool { return o.Flow.NodeName == "default/n1" }},
		{filter: "--namespace other", none: true},
		{filter: "--protocol udp --port 9999", none: true},
		{filter: "--since 1h --until 30m", none: true},
	} {
		flows := n.observe(n.socket(), strings.Fields(test.filter)...)
		if (len(flows) == 0) != test.none {
			t.Errorf("%s: %d flows", test.filter, len(flows))
		}
		for i := range flows {
			if test.none || !test.want(&flows[i]) {
				t.Errorf("%s: %+v", test.filter, flows[i])
				break
			}
		}
	}
	text, err := output(t, n.Do, "observe", "--server", n.socket(), "--last", "100", "--verdict", "DROPPED", "--to-pod", "shop/web", "--color", "never")
	if err != nil || !strings.Contains(text, "shop/stranger:") || !strings.Contains(text, "Policy denied DROPPED (TCP Flags: SYN)") {
		t.Errorf("hubble observe prints\n%s%v", text, err)
	}
	status, err := output(t, n.Do, "status", "--server", n.socket())
	if err != nil || !strings.Contains(status, "Healthcheck") || !strings.Contains(status, "Ok") || !strings.Contains(status, "/4,095") {
		t.Errorf("hubble status prints\n%s%v", status, err)
	}
	for list, want := range map[string]string{"namespaces": "shop", "nodes": "n1"} {
		if text, err := output(t, n.Do, "list", list, "--server", n.socket()); err != nil || !strings.Contains(text, want) {
			t.Errorf("hubble list %s prints\n%s%v", list, text, err)
		}
	}
	n.follow()
}

// follow reads "hubble observe --follow".
func (n *node) follow() {
	t := n.t
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := program(ctx, t, "hubble", "observe", "--server", n.socket(), "--follow", "--verdict", "DROPPED", "-o", "compact")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := n.Do(cmd.Start); err != nil {
		t.Fatal(err)
	}
	lines := make(chan string, 1)
	go func() {
		if s := bufio.NewScanner(out); s.Scan() {
			lines <- s.Text()
		}
		close(lines)
	}()
	for {
		n.connect("stranger")
		select {
		case line := <-lines:
			if !strings.Contains(line, "shop/stranger:") || !strings.Contains(line, "shop/web:80") {
				t.Errorf("hubble observe --follow prints %q", line)
			}
			cancel()
			_ = cmd.Wait()
			return
		default:
		}
	}
}

// Relay finds the observers by the peer service of one, and asks both.
func TestRelay(t *testing.T) {
	plugins, podgate := build(t)
	n1, n2 := newNode(t, "n1", plugins, podgate), newNode(t, "n2", plugins, podgate)
	const peer = "198.51.100."
	link(t, n1, n2, peer+"1/24", peer+"2/24")
	n1.start("observe", "--listen", peer+"1:4244", "--disable-server-tls", "--peer", "n2="+peer+"2")
	n2.start("observe", "--listen", peer+"2:4244", "--disable-server-tls")
	for _, n := range []*node{n1, n2} {
		n.until("serving", func() bool {
			_, err := os.Stat(filepath.Join(n.run, "hubble.sock"))
			return err == nil && n.connect("client") && !n.connect("stranger")
		})
	}
	n1.stay(program(t.Context(), t, "hubble-relay", "serve", "--peer-service", n1.socket(), "--disable-client-tls", "--disable-server-tls",
		"--listen-address", "127.0.0.1:4245", "--health-listen-address", "127.0.0.1:4222"))
	const server = "127.0.0.1:4245"
	n1.until("relayed from both nodes", func() bool {
		out, err := output(t, n1.Do, "status", "--server", server)
		return err == nil && strings.Contains(out, "Connected Nodes: 2/2")
	})
	n1.until("flows of both nodes", func() bool {
		n1.connect("stranger")
		n2.connect("stranger")
		nodes := make(map[string]bool)
		for _, o := range n1.observe(server, "--verdict", "DROPPED", "--to-pod", "shop/web") {
			nodes[o.Flow.NodeName] = true
		}
		return nodes["default/n1"] && nodes["default/n2"]
	})
	out, err := output(t, n1.Do, "list", "nodes", "--server", server)
	for _, want := range []string{"n1", "n2"} {
		if err != nil || !strings.Contains(out, want) || strings.Count(out, "Connected") != 2 {
			t.Errorf("hubble list nodes prints\n%s%v", out, err)
		}
	}
}

// link puts a veth with addresses between two nodes.
func link(t *testing.T, a, b *node, addrA, addrB string) {
	t.Helper()
	other, err := netns.GetFromPath(b.NetNS())
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	up := func(name, addr string) func() error {
		return func() error {
			l, err := netlink.LinkByName(name)
			if err != nil {
				return err
			}
			address, err := netlink.ParseAddr(addr)
			if err != nil {
				return err
			}
			if err := netlink.AddrAdd(l, address); err != nil {
				return err
			}
			return netlink.LinkSetUp(l)
		}
	}
	if err := a.Do(func() error {
		return netlink.LinkAdd(&netlink.Veth{
			LinkAttrs: netlink.LinkAttrs{Name: "wire"}, PeerName: "wire", PeerNamespace: netlink.NsFd(other),
		})
	}); err != nil {
		t.Fatal(err)
	}
	for _, end := range []struct {
		in   *node
		addr string
	}{{a, addrA}, {b, addrB}} {
		if err := end.in.Do(up("wire", end.addr)); err != nil {
			t.Fatal(err)
		}
	}
}
