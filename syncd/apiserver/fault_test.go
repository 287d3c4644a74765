// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package apiserver

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/podgate/podgate/bpf/policy"
	"github.com/podgate/podgate/syncd/manifest"
	"github.com/podgate/podgate/test/controlplane"
)

// TestFaults stores objects that the API server would have refused.
func TestFaults(t *testing.T) {
	t.Parallel()
	plane := controlplane.Start(t, nil)
	c := cluster{t, plane.Client()}
	c.node("n1")
	c.namespace("a", "1")
	c.namespace("elsewhere", "1")
	c.pod("a", "x", "n1", nil)
	m := run(t, plane.Config(controlplane.AdminToken))
	m.until("followed", func() bool { return m.batches > 0 && len(m.pending) == 0 && len(m.problems) == 0 })

	store := func(namespace, name, spec string) manifest.Key {
		plane.Store("networkpolicies/"+namespace+"/"+name, fmt.Appendf(nil,
			`{"kind": "NetworkPolicy", "apiVersion": "networking.k8s.io/v1", "metadata": {"namespace": %q, "name": %q, "uid": "uid-%s"}, "spec": %s}`,
			namespace, name, name, spec))
		return manifest.Key{Kind: manifest.KindNetworkPolicy, Namespace: namespace, Name: name}
	}
	nothing := func(r policy.Rule) bool { return !r.AnyPeer && len(r.Peers) == 0 && !r.AnyPort && len(r.Ports) == 0 }
	for _, tt := range []struct {
		name, spec, want, problem string
		// closed are the ingress rules that have to match nothing.
		closed []int
	}{
		{
			name:   "cidr",
			spec:   `{"podSelector": {}, "policyTypes": ["Ingress"], "ingress": [{"from": [{"ipBlock": {"cidr": "10.0.0.300/8"}}]}, {}]}`,
			want:   "isolates [true false], 2 in, 0 out",
			closed: []int{0}, problem: `spec.ingress[0].from[0].ipBlock.cidr: Invalid value: "10.0.0.300/8"`,
		},
		{
			name:   "except",
			spec:   `{"podSelector": {}, "ingress": [{"from": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["11.0.0.0/8"]}}]}]}`,
			want:   "isolates [true false], 1 in, 0 out",
			closed: []int{0}, problem: `spec.ingress[0].from[0].ipBlock.except[0]: Invalid value: "11.0.0.0/8"`,
		},
		{
			name:   "peer",
			spec:   `{"podSelector": {}, "ingress": [{"from": [{"serviceAccount": "x"}]}]}`,
			want:   "isolates [true false], 1 in, 0 out",
			closed: []int{0}, problem: "spec.ingress[0].from[0]: Required value: a peer needs",
		},
		{
			name:   "port",
			spec:   `{"podSelector": {}, "ingress": [{"ports": [{"port": 70000}]}, {"ports": [{"port": 1, "protocol": "QUIC"}]}]}`,
			want:   "isolates [true false], 2 in, 0 out",
			closed: []int{0, 1}, problem: `spec.ingress[0].ports[0].port: Invalid value: 70000`,
		},
		{
			name:    "types",
			spec:    `{"podSelector": {}, "policyTypes": ["Ingress", "Forward"], "ingress": [{}]}`,
			want:    "isolates [true true], 1 in, 0 out",
			problem: `spec.policyTypes[1]: Unsupported value: "Forward"`,
		},
		{
			name:    "selector",
			spec:    `{"podSelector": {"matchExpressions": [{"key": "l", "operator": "Like", "values": ["x"]}]}, "ingress": [{}]}`,
			want:    "isolates [true false], 1 in, 0 out",
			problem: `spec.podSelector.matchExpressions[0].operator: Invalid value: "Like"`,
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			key := store("a", tt.name, tt.spec)
			m.says(key, tt.want)
			m.mu.Lock()
			p := m.objects[key].Policy
			for i, r := range p.Rules[policy.Ingress] {
				if closed := strings.Contains(fmt.Sprint(tt.closed), fmt.Sprint(i)); closed != nothing(r) {
					t.Errorf("rule %d: %+v", i, r)
				}
			}
			if tt.name == "selector" && (len(p.Subject.Pods) > 0 || p.Subject.Namespace != "a") {
				t.Errorf("subject %+v", p.Subject)
			}
			m.mu.Unlock()
			m.until("named", func() bool {
				return hasProblem(m.problems, "NetworkPolicy a/"+tt.name+": "+tt.problem) && hasProblem(m.problems, "allows nothing")
			})
		})
	}
	t.Run("a later server", func(t *testing.T) {
		config := plane.Config(controlplane.AdminToken)
		config.Wrap(func(next http.RoundTripper) http.RoundTripper { return later{next} })
		m := run(t, config)
		c.policy("elsewhere", "timed", networkingv1.NetworkPolicySpec{Ingress: []networkingv1.NetworkPolicyIngressRule{{
			From: []networkingv1.NetworkPolicyPeer{{PodSelector: &metav1.LabelSelector{}}},
		}}})
		key := manifest.Key{Kind: manifest.KindNetworkPolicy, Namespace: "elsewhere", Name: "timed"}
		m.says(key, "isolates [true false], 1 in, 0 out")
		m.until("named", func() bool {
			return hasProblem(m.problems, "spec.ingress[0].hours: Forbidden: this version of podgate does not know")
		})
		m.mu.Lock()
		defer m.mu.Unlock()
		if r := m.objects[key].Policy.Rules[policy.Ingress][0]; !nothing(r) {
			t.Errorf("rule %+v", r)
		}
	})
	t.Run("events", func(t *testing.T) {
		key := store("elsewhere", "cidr", `{"podSelector": {}, "ingress": [{"from": [{"ipBlock": {"cidr": "x"}}]}]}`)
		m.says(key, "isolates [true false], 1 in, 0 out")
		m.notify()
		deadline := time.Now().Add(30 * time.Second)
		for {
			events, err := c.CoreV1().Events("").List(t.Context(), metav1.ListOptions{})
			if err != nil {
				t.Fatal(err)
			}
			about := make(map[string]string)
			for _, e := range events.Items {
				about[e.InvolvedObject.Kind+" "+e.InvolvedObject.Namespace+"/"+e.InvolvedObject.Name+" "+string(e.InvolvedObject.UID)+" "+e.Reason] = e.Message
			}
			// None about a policy that has nothing to do with this node.
			if len(about) == 6 {
				if e := about["NetworkPolicy a/cidr uid-cidr PolicyProblem"]; !strings.HasPrefix(e, "node n1: spec.ingress[0]") {
					t.Errorf("events %q", about)
				}
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("events %q", about)
			}
			time.Sleep(20 * time.Millisecond)
		}
	})
	t.Run("many faults", func(t *testing.T) {
		rules := strings.TrimSuffix(strings.Repeat(`{"from": [{}]},`, 100), ",")
		key := store("a", "many", `{"podSelector": {}, "ingress": [`+rules+`]}`)
		m.says(key, "isolates [true false], 100 in, 0 out")
		m.until("named", func() bool { return hasProblem(m.problems, "ipBlock; and 95 more") })
		if err := c.NetworkingV1().NetworkPolicies("a").Delete(t.Context(), "many", metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("mended", func(t *testing.T) {
		for _, name := range []string{"cidr", "except", "peer", "port", "types", "selector"} {
			if err := c.NetworkingV1().NetworkPolicies("a").Delete(t.Context(), name, metav1.DeleteOptions{}); err != nil {
				t.Fatal(err)
			}
		}
		m.until("one left", func() bool { return len(m.problems) == 1 && hasProblem(m.problems, "elsewhere/cidr") })
	})
	t.Run("10 MB", func(t *testing.T) {
		var blocks strings.Builder
		for i := range 250_000 {
			fmt.Fprintf(&blocks, `{"ipBlock": {"cidr": "10.%d.%d.%d/32"}},`, i>>16, i>>8&255, i&255)
		}
		key := store("a", "big", `{"podSelector": {}, "ingress": [{"from": [`+strings.TrimSuffix(blocks.String(), ",")+`]}]}`)
		m.untilWithin(3*time.Minute, "read", func() bool { return m.objects[key].Policy != nil })
		m.mu.Lock()
		defer m.mu.Unlock()
		if n := len(m.objects[key].Policy.Rules[policy.Ingress][0].Peers); n != 250_000 {
			t.Errorf("%d peers", n)
		}
	})
}

// later is a server whose policies have a field that nobody knows here.
type later struct{ http.RoundTripper }

func (l later) RoundTrip(r *http.Request) (*http.Response, error) {
	response, err := l.RoundTripper.RoundTrip(r)
	if err != nil || !strings.Contains(r.URL.Path, "networkpolicies") {
		return response, err
	}
	in := response.Body
	body, out := pipe(in)
	response.Body = body
	go func() {
		lines := bufio.NewReader(in)
		for {
			line, err := lines.ReadString('\n')
			_, failed := io.WriteString(out, strings.ReplaceAll(line, `"ingress":[{"from"`, `"ingress":[{"hours":"9-17","from"`))
			if err != nil || failed != nil {
				out.CloseWithError(err)
				return
			}
		}
	}()
	return response, nil
}

// pipe is a body that ends with the one it stands for.
func pipe(in io.Closer) (io.ReadCloser, *io.PipeWriter) {
	r, w := io.Pipe()
	return struct {
		io.Reader
		io.Closer
	}{r, closers{in, r}}, w
}

type closers []io.Closer

func (c closers) Close() error {
	var errs []error
	for _, one := range c {
		errs = append(errs, one.Close())
	}
	return errors.Join(errs...)
}

// TestOutages lets the server go, hang, and refuse the daemon.
func TestOutages(t *testing.T) {
	t.Parallel()
	plane := controlplane.Start(t, nil)
	c := cluster{t, plane.Client()}
	c.node("n1")
	c.namespace("a", "1")
	c.policy("a", "deny", networkingv1.NetworkPolicySpec{})
	key := manifest.Key{Kind: manifest.KindNetworkPolicy, Namespace: "a", Name: "deny"}

	c.account("podgate")
	old := c.token("podgate")
	file := plane.TokenFile("token", old)
	config, err := Config(plane.Kubeconfig(file), "podgate/test")
	if err != nil {
		t.Fatal(err)
	}
	m := run(t, config)
	m.says(key, "isolates [true false], 0 in, 0 out")
	m.until("well", func() bool { return len(m.problems) == 0 && len(m.pending) == 0 })

	// Gone, and changed when it comes back.
	plane.StopAPIServer()
	began := time.Now()
	m.until("said", func() bool { return hasProblem(m.problems, "connection refused; what it said before stays in force") })
	m.mu.Lock()
	if since := m.problems[0].Since; since.Before(began.Add(-time.Second)) || since.After(time.Now()) {
		t.Errorf("since %v, and it ended at %v", since, began)
	}
	if _, ok := m.objects[key]; !ok {
		t.Error("the policy went with the server")
	}
	m.mu.Unlock()
	plane.StartAPIServer()
	c.namespace("b", "1")
	m.says(manifest.Key{Kind: manifest.KindNamespace, Name: "b"}, "1")
	m.until("well", func() bool { return len(m.problems) == 0 })

	// Its credentials are worth nothing any more, until the file has new ones.
	if err := c.CoreV1().ServiceAccounts("a").Delete(t.Context(), "podgate", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	plane.StopAPIServer()
	plane.StartAPIServer()
	m.until("refused", func() bool { return hasProblem(m.problems, string(metav1.StatusReasonUnauthorized)) })
	c.account("podgate")
	if err := os.WriteFile(file, []byte(c.token("podgate")), 0o600); err != nil {
		t.Fatal(err)
	}
	c.policy("b", "deny", networkingv1.NetworkPolicySpec{})
	m.untilWithin(3*time.Minute, "let in again", func() bool {
		_, ok := m.objects[manifest.Key{Kind: manifest.KindNetworkPolicy, Namespace: "b", Name: "deny"}]
		return ok && len(m.problems) == 0
	})

	// A daemon that starts meanwhile knows that it knows nothing.
	plane.Freeze()
	late := run(t, plane.Config(controlplane.AdminToken))
	late.until("said", func() bool { return hasProblem(late.problems, "what was enforced before stays so") })
	late.mu.Lock()
	if len(late.objects) > 0 || len(late.pending) == 0 {
		t.Errorf("objects %v, pending %v", late.objects, late.pending)
	}
	late.mu.Unlock()
	s, err := New(Options{Config: plane.Config(controlplane.AdminToken), Node: "n1", Patience: time.Second})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Load(t.Context()); err == nil || !strings.Contains(err.Error(), "API server https://127.0.0.1:") {
		t.Errorf("Load: %v", err)
	}
	plane.Thaw()
	late.says(key, "isolates [true false], 0 in, 0 out")
	late.until("well", func() bool { return len(late.problems) == 0 && len(late.pending) == 0 })
}

// TestForbidden asks that what may not be read is named, and that the rest
// waits for what policy needs of it only.
func TestForbidden(t *testing.T) {
	t.Parallel()
	plane := controlplane.Start(t, nil)
	c := cluster{t, plane.Client()}
	c.node("n1")
	c.namespace("a", "1")
	c.account("podgate", "services")
	config := plane.Config(c.token("podgate"))
	m := run(t, config)
	m.until("named", func() bool {
		return hasProblem(m.problems, `services is forbidden`) && hasProblem(m.problems, "services: ")
	})
	m.says(manifest.Key{Kind: manifest.KindNamespace, Name: "a"}, "1")
	m.until("all but Services known", func() bool { return len(m.pending) == 1 && m.pending[0] == manifest.KindService })
}

func TestConfigFaults(t *testing.T) {
	if _, err := Config(t.TempDir()+"/missing", "x"); err == nil || !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a missing kubeconfig: %v", err)
	}
	broken := t.TempDir() + "/broken"
	if err := os.WriteFile(broken, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Config(broken, "x"); err == nil || !strings.Contains(err.Error(), broken) {
		t.Errorf("a broken kubeconfig: %v", err)
	}
	if _, err := Config(InCluster, "x"); err == nil || clientcmd.IsEmptyConfig(err) {
		t.Errorf("in no cluster: %v", err)
	}
}

// account makes a service account that may read what the daemon needs, less
// some resources.
func (c cluster) account(name string, less ...string) {
	c.t.Helper()
	ctx := c.t.Context()
	account := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: name}}
	if _, err := c.CoreV1().ServiceAccounts("a").Create(ctx, account, metav1.CreateOptions{}); err != nil {
		c.t.Fatal(err)
	}
	read := []string{"get", "list", "watch"}
	core := []string{"pods", "namespaces", "nodes"}
	if len(less) == 0 {
		core = append(core, "services")
	}
	role := &rbacv1.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: name}, Rules: []rbacv1.PolicyRule{
		{APIGroups: []string{""}, Resources: core, Verbs: read},
		{APIGroups: []string{"networking.k8s.io"}, Resources: []string{"networkpolicies"}, Verbs: read},
		{APIGroups: []string{"discovery.k8s.io"}, Resources: []string{"endpointslices"}, Verbs: read},
		{APIGroups: []string{""}, Resources: []string{"events"}, Verbs: []string{"create", "patch", "update"}},
	}}
	binding := &rbacv1.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: name},
		Subjects:   []rbacv1.Subject{{Kind: rbacv1.ServiceAccountKind, Namespace: "a", Name: name}},
	}
	if _, err := c.RbacV1().ClusterRoles().Get(ctx, name, metav1.GetOptions{}); err == nil {
		return
	}
	if _, err := c.RbacV1().ClusterRoles().Create(ctx, role, metav1.CreateOptions{}); err != nil {
		c.t.Fatal(err)
	}
	if _, err := c.RbacV1().ClusterRoleBindings().Create(ctx, binding, metav1.CreateOptions{}); err != nil {
		c.t.Fatal(err)
	}
}

// token asks for a token of a service account.
func (c cluster) token(name string) string {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), time.Minute)
	defer cancel()
	r, err := c.CoreV1().ServiceAccounts("a").CreateToken(ctx, name, &authenticationv1.TokenRequest{}, metav1.CreateOptions{})
	if err != nil {
		c.t.Fatal(err)
	}
	return r.Status.Token
}
