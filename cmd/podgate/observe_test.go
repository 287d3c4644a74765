// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	flowpb "github.com/cilium/cilium/api/v1/flow"
	observerpb "github.com/cilium/cilium/api/v1/observer"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/fieldmaskpb"
)

// observePolicy lets the client in and nobody else, and web out nowhere.
const observePolicy = `
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {team: retail}}
---
apiVersion: v1
kind: Pod
metadata:
  {name: web, namespace: shop, uid: uid-web, labels: {app: web, pod-template-hash: 5d9f},
   ownerReferences: [{apiVersion: apps/v1, kind: ReplicaSet, name: web-5d9f, uid: u, controller: true}]}
spec: {nodeName: n1}
---
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: shop, uid: uid-client, labels: {app: client}}
spec: {nodeName: n1}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: only-client, namespace: shop}
spec:
  podSelector: {matchLabels: {app: web}}
  policyTypes: [Ingress]
  ingress: [{from: [{podSelector: {matchLabels: {app: client}}}], ports: [{port: 80}]}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: nothing-else, namespace: shop}
spec: {podSelector: {matchLabels: {app: web}}, policyTypes: [Ingress]}
`

// observeLab is a node with three pods, policy for them and an observer.
func observeLab(t *testing.T) (*lab, observerpb.ObserverClient) {
	l := newLab(t)
	l.write("shop.yaml", observePolicy)
	l.sync()
	l.until("synced", func() bool { return l.status().Daemon != nil && !l.status().Daemon.Synced.IsZero() })
	for _, pod := range []string{"web", "client", "stranger"} {
		l.addPod(pod)
	}
	l.until("enforcing", func() bool { return states(l.status())["shop/web"] == "enforcing" })
	l.listen("web")
	l.background("observe")
	return l, l.observer()
}

// observer is a client of podgate observe that answers.
func (l *lab) observer() observerpb.ObserverClient {
	l.t.Helper()
	c, err := grpc.NewClient("unix://"+filepath.Join(l.runDir, "hubble.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { c.Close() })
	client := observerpb.NewObserverClient(c)
	l.until("observed", func() bool {
		_, err := client.ServerStatus(l.t.Context(), &observerpb.ServerStatusRequest{})
		return err == nil
	})
	return client
}

// getFlows reads what the observer remembers.
func getFlows(t *testing.T, c observerpb.ObserverClient, req *observerpb.GetFlowsRequest) (out []*flowpb.Flow) {
	t.Helper()
	stream, err := c.GetFlows(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	for {
		answer, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		if f := answer.GetFlow(); f != nil {
			out = append(out, f)
		}
	}
}

// between asks for flows from one pod to another.
func between(from, to string) []*flowpb.FlowFilter {
	return []*flowpb.FlowFilter{{SourcePod: []string{from}, DestinationPod: []string{to}, Protocol: []string{"tcp"}}}
}

func policyNames(policies []*flowpb.Policy) (out []string) {
	for _, p := range policies {
		out = append(out, p.GetKind()+" "+p.GetNamespace()+"/"+p.GetName())
	}
	slices.Sort(out)
	return out
}

func TestObserve(t *testing.T) {
	t.Parallel()
	l, c := observeLab(t)
	if !l.reaches("client", "web") || l.reaches("stranger", "web") {
		t.Fatal("policy is not what the test needs")
	}
	var allowed, denied []*flowpb.Flow
	l.until("seen", func() bool {
		allowed = getFlows(t, c, &observerpb.GetFlowsRequest{Whitelist: between("shop/client", "shop/web")})
		denied = getFlows(t, c, &observerpb.GetFlowsRequest{Whitelist: between("shop/stranger", "shop/web"),
			Blacklist: []*flowpb.FlowFilter{{TrafficDirection: []flowpb.TrafficDirection{flowpb.TrafficDirection_EGRESS}}}})
		return len(allowed) >= 4 && len(denied) >= 2 // two hooks and two families, one hook and two families
	})
	for _, f := range allowed {
		if f.GetVerdict() != flowpb.Verdict_FORWARDED || f.GetIsReply() == nil || f.GetIsReply().GetValue() ||
			f.GetL4().GetTCP().GetDestinationPort() != 80 || !f.GetL4().GetTCP().GetFlags().GetSYN() ||
			f.GetNodeName() != "default/n1" || f.GetUuid() == "" {
			t.Errorf("allowed flow is %v", f)
		}
		want := []string(nil)
		if f.GetTrafficDirection() == flowpb.TrafficDirection_INGRESS {
			want = []string{"NetworkPolicy shop/only-client"}
		}
		if got := policyNames(f.GetIngressAllowedBy()); !slices.Equal(got, want) || len(f.GetEgressAllowedBy()) > 0 {
			t.Errorf("%v is allowed by %v, not %v", f, got, want)
		}
		for _, e := range []struct {
			got  *flowpb.Endpoint
			pod  string
			kind string
		}{{f.GetSource(), "client", ""}, {f.GetDestination(), "web", "Deployment"}} {
			if e.got.GetPodName() != e.pod || e.got.GetNamespace() != "shop" || e.got.GetIdentity() < 256 ||
				!slices.Contains(e.got.GetLabels(), "k8s:app="+e.pod) ||
				!slices.Contains(e.got.GetLabels(), "k8s:io.cilium.k8s.namespace.labels.team=retail") {
				t.Errorf("%s is %v", e.pod, e.got)
			}
			if e.kind != "" && (len(e.got.GetWorkloads()) != 1 || e.got.GetWorkloads()[0].GetKind() != e.kind || e.got.GetWorkloads()[0].GetName() != e.pod) {
				t.Errorf("%s has the workloads %v", e.pod, e.got.GetWorkloads())
			}
		}
	}
	for _, f := range denied {
		if f.GetVerdict() != flowpb.Verdict_DROPPED || f.GetDropReasonDesc() != flowpb.DropReason_POLICY_DENIED {
			t.Errorf("denied flow is %v", f)
		}
		// Both policies isolate, so both deny.
		want := []string{"NetworkPolicy shop/nothing-else", "NetworkPolicy shop/only-client"}
		if got := policyNames(f.GetIngressDeniedBy()); !slices.Equal(got, want) {
			t.Errorf("%v is denied by %v, not %v", f, got, want)
		}
	}
	namespaces, err := c.GetNamespaces(t.Context(), &observerpb.GetNamespacesRequest{})
	if err != nil || len(namespaces.GetNamespaces()) != 1 || namespaces.GetNamespaces()[0].GetNamespace() != "shop" {
		t.Errorf("namespaces are %v, %v", namespaces, err)
	}
	nodes, err := c.GetNodes(t.Context(), &observerpb.GetNodesRequest{})
	if err != nil || len(nodes.GetNodes()) != 1 || nodes.GetNodes()[0].GetName() != "default/n1" {
		t.Errorf("nodes are %v, %v", nodes, err)
	}
	masked := getFlows(t, c, &observerpb.GetFlowsRequest{Number: 1, FieldMask: &fieldmaskpb.FieldMask{Paths: []string{"verdict", "source.pod_name"}}})
	if len(masked) != 1 || masked[0].GetIP() != nil || masked[0].GetVerdict() == 0 {
		t.Errorf("masked flows are %v", masked)
	}
	// podgate flows asks it, and says the same.
	out := l.ok(0, "flows", "--verdict", "denied", "--pod", "shop/web")
	if !strings.Contains(out, "isolated, no rule matched") || !strings.Contains(out, "shop/stranger") {
		t.Errorf("podgate flows prints\n%s", out)
	}
	// The rule was used, and what no rule allows is known.
	var usage usageReport
	l.json(0, &usage, "policy", "--usage")
	if len(usage.Unused) != 0 || len(usage.Attempts) == 0 {
		t.Errorf("usage is %+v", usage)
	}
	for _, u := range usage.Attempts {
		if u.Pod == "shop/web" && u.Peer == "shop/stranger" && (u.Port != 80 || u.Direction != "ingress" || u.Count < 2 || u.Verdict != "denied") {
			t.Errorf("attempt is %+v", u)
		}
	}
	if out := l.ok(0, "policy", "--usage"); !strings.Contains(out, "80/TCP") || !strings.Contains(out, "shop/stranger") {
		t.Errorf("podgate policy --usage prints\n%s", out)
	}
}

func TestObserveFollow(t *testing.T) {
	t.Parallel()
	l, c := observeLab(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	stream, err := c.GetFlows(ctx, &observerpb.GetFlowsRequest{Follow: true, Whitelist: []*flowpb.FlowFilter{
		{Verdict: []flowpb.Verdict{flowpb.Verdict_DROPPED}, SourceLabel: []string{"!app"}, DestinationPort: []string{"80"}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	// The request is under way until an answer is; so it is repeated.
	got := make(chan *flowpb.Flow, 1)
	go func() {
		for {
			answer, err := stream.Recv()
			if err != nil {
				close(got)
				return
			}
			if f := answer.GetFlow(); f != nil {
				got <- f
				return
			}
		}
	}()
	for {
		l.reaches("client", "web")
		l.reaches("stranger", "web")
		select {
		case f, ok := <-got:
			if !ok {
				t.Fatal("the stream ended")
			}
			if f.GetSource().GetPodName() != "stranger" || f.GetDestination().GetPodName() != "web" {
				t.Errorf("got %v", f)
			}
			return
		default:
		}
	}
}

// An observer that dies, and one that comes back, change nothing for pods; and
// the events are there for whoever comes next.
func TestObserveRestarts(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.write("shop.yaml", observePolicy)
	first := l.background("observe", "--node-name", "n1")
	c := l.observer() // before there is anything to observe
	l.sync()
	for _, pod := range []string{"web", "client", "stranger"} {
		l.addPod(pod)
	}
	l.until("enforcing", func() bool { return states(l.status())["shop/web"] == "enforcing" })
	l.listen("web")
	l.until("seen", func() bool {
		l.reaches("client", "web")
		return len(getFlows(t, c, &observerpb.GetFlowsRequest{Whitelist: between("shop/client", "shop/web")})) > 0
	})
	if code, _, errs := l.run("observe"); code != 1 || !strings.Contains(errs, "another process serves it") {
		t.Errorf("a second observer: %d, %s", code, errs)
	}
	first.end(t, unix.SIGKILL)
	if !l.reaches("client", "web") || l.reaches("stranger", "web") {
		t.Error("policy is not enforced without an observer")
	}
	second := l.background("observe", "--node-name", "n1")
	c = l.observer()
	l.until("seen by the next one", func() bool {
		return len(getFlows(t, c, &observerpb.GetFlowsRequest{Whitelist: between("shop/stranger", "shop/web")})) > 0
	})
	second.end(t, unix.SIGTERM)
	if code, _, _ := l.run("flows"); code != 0 {
		t.Errorf("podgate flows after the observer: %d", code)
	}
}

// Metrics say what the traffic was: exactly where the kernel counts.
func TestObserveMetrics(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.write("shop.yaml", observePolicy)
	l.sync()
	for _, pod := range []string{"web", "client", "stranger"} {
		l.addPod(pod)
	}
	l.until("enforcing", func() bool { return states(l.status())["shop/web"] == "enforcing" })
	l.listen("web")
	const address = "127.0.0.1:9091"
	l.background("observe", "--metrics", address, "--pprof")
	client := http.Client{Transport: &http.Transport{
		// The connection is the node's, wherever the client makes it.
		DialContext: func(ctx context.Context, network, addr string) (c net.Conn, err error) {
			err = l.node.Do(func() error {
				c, err = (&net.Dialer{}).DialContext(ctx, network, addr)
				return err
			})
			return c, err
		},
		DisableKeepAlives: true,
	}}
	get := func(path string) (code int, body string) {
		response, err := client.Get("http://" + address + path)
		if err != nil {
			return 0, err.Error()
		}
		defer response.Body.Close()
		text, err := io.ReadAll(response.Body)
		if err != nil {
			return 0, err.Error()
		}
		return response.StatusCode, string(text)
	}
	l.until("ready", func() bool { code, _ := get("/readyz"); return code == http.StatusOK })
	lines := func() map[string]float64 {
		_, body := get("/metrics")
		out := make(map[string]float64)
		for line := range strings.Lines(body) {
			if name, value, ok := cutLast(strings.TrimSpace(line)); ok {
				if n, err := strconv.ParseFloat(value, 64); err == nil {
					out[name] = n
				}
			}
		}
		return out
	}
	reaches := l.reaches("client", "web")
	if !reaches || l.reaches("stranger", "web") {
		t.Fatal("policy is not what the test needs")
	}
	for name, atLeast := range map[string]float64{
		`podgate_flows_total{direction="ingress",namespace="shop",peer="client",peer_kind="Pod",peer_namespace="shop",policy="shop/only-client",reason="policy",verdict="allowed",workload="web",workload_kind="Deployment"}`: 2,
		`podgate_packets_total{direction="ingress",namespace="shop",verdict="allowed",workload="web",workload_kind="Deployment"}`:                                                                                             6,
		`podgate_packets_total{direction="ingress",namespace="shop",verdict="denied",workload="web",workload_kind="Deployment"}`:                                                                                              2,
		`podgate_bytes_total{direction="egress",namespace="shop",verdict="allowed",workload="client",workload_kind="Pod"}`:                                                                                                    300,
		`podgate_dropped_packets_total{direction="ingress",reason="default"}`:                                                                                                                                                 2,
		`podgate_policy_packets_total{action="allow",direction="ingress",kind="NetworkPolicy",namespace="shop",policy="only-client"}`:                                                                                         2,
		`podgate_tcp_handshake_seconds_count{direction="egress",namespace="shop",workload="client",workload_kind="Pod"}`:                                                                                                      1,
		`podgate_observe_up`: 1,
	} {
		l.until(name, func() bool { return lines()[name] >= atLeast })
	}
	if code, _ := get("/healthz"); code != http.StatusOK {
		t.Errorf("/healthz: %d", code)
	}
	if code, _ := get("/debug/pprof/cmdline"); code != http.StatusOK {
		t.Errorf("/debug/pprof: %d", code)
	}
}

// cutLast cuts a line of metrics before its value.
func cutLast(line string) (name, value string, ok bool) {
	i := strings.LastIndexByte(line, ' ')
	if i < 0 || strings.HasPrefix(line, "#") {
		return "", "", false
	}
	return line[:i], line[i+1:], true
}
