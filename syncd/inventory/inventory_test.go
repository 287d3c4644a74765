// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package inventory

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/podgate/podgate/bpf/policy"
	"github.com/podgate/podgate/pinning"
	"github.com/podgate/podgate/syncd/manifest"
	"github.com/podgate/podgate/syncd/source"
)

func decode(t *testing.T, text string) []manifest.Object {
	t.Helper()
	objects, err := manifest.Decode("f.yaml", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return objects
}

// pods is a manifest of pods, each "name [key=value...]" with keys uid, node,
// ip, label, host, phase, deleted, audit, mirror, created (a year).
func pods(specs ...string) string {
	var b strings.Builder
	for _, spec := range specs {
		words := strings.Fields(spec)
		v := map[string]string{}
		for _, w := range words[1:] {
			key, value, _ := strings.Cut(w, "=")
			v[key] = value
		}
		namespace, name, _ := strings.Cut(words[0], "/")
		fmt.Fprintf(&b, "---\napiVersion: v1\nkind: Pod\nmetadata: {namespace: %q, name: %q, uid: %q, labels: {l: %q}", namespace, name, v["uid"], v["label"])
		if v["deleted"] != "" {
			b.WriteString(`, deletionTimestamp: "2026-01-02T03:04:05Z"`)
		}
		if v["audit"] != "" {
			b.WriteString(`, annotations: {podgate.io/audit: "true"}`)
		}
		if v["mirror"] != "" {
			fmt.Fprintf(&b, ", annotations: {kubernetes.io/config.mirror: %q}", v["mirror"])
		}
		if v["created"] != "" {
			fmt.Fprintf(&b, `, creationTimestamp: "%s-01-02T03:04:05Z"`, v["created"])
		}
		fmt.Fprintf(&b, "}\nspec: {nodeName: %q, hostNetwork: %v}\nstatus: {podIP: %q, phase: %q}\n", v["node"], v["host"] != "", v["ip"], v["phase"])
	}
	return b.String()
}

func endpoint(id uint32, container, uid, pod string, labels map[string]string, addrs ...string) pinning.Endpoint {
	ep := pinning.Endpoint{ID: id, PodUID: uid, Labels: labels}
	ep.Key = pinning.AttachmentKey{ContainerID: container, IfName: "eth0"}
	ep.PodNamespace, ep.PodName, _ = strings.Cut(pod, "/")
	for _, a := range addrs {
		ep.Addresses = append(ep.Addresses, netip.MustParseAddr(a))
	}
	return ep
}

// describe is a pod in one line.
func describe(p policy.Pod) string {
	s := fmt.Sprintf("%s %s/%s %v", p.Key, p.Namespace, p.Name, p.Addresses)
	if p.Local {
		s += " local"
	}
	if p.Audit {
		s += " audit"
	}
	if l := p.Labels["l"]; l != "" {
		s += " l=" + l
	}
	return s
}

func TestUpdate(t *testing.T) {
	dir := Options{Node: "n1", Unlisted: true}
	api := Options{Node: "n1"}
	tests := []struct {
		name      string
		opts      Options
		objects   string
		endpoints []pinning.Endpoint
		want      []string
		bindings  []string // container=pod
		problems  []string
	}{
		{
			name: "pods here, elsewhere and not yet anywhere", opts: dir,
			objects: pods("a/here uid=u1 node=n1", "a/there uid=u2 node=n2 ip=10.0.0.2", "a/somewhere ip=10.0.0.3", "a/soon",
				"a/herewithip node=n1 ip=10.0.0.4"),
			want: []string{"u1 a/here [] local", "a/herewithip a/herewithip [10.0.0.4] local", "a/somewhere a/somewhere [10.0.0.3]",
				"a/soon a/soon [] local", "u2 a/there [10.0.0.2]"},
		},
		{
			name: "all local", opts: Options{AllLocal: true},
			objects: pods("a/there node=n2 ip=10.0.0.2"),
			want:    []string{"a/there a/there [10.0.0.2] local"},
		},
		{
			name: "by UID before name; the endpoint knows the addresses", opts: dir,
			objects: pods("a/x uid=u1 ip=10.9.9.9 label=1", "a/y uid=u2 label=2"),
			endpoints: []pinning.Endpoint{
				endpoint(1, "c1", "u1", "a/y", nil, "10.0.0.1", "fd00::1", "fe80::1"),
				endpoint(2, "c2", "u2", "a/y", nil, "10.0.0.2"),
			},
			want:     []string{"u1 a/x [10.0.0.1 fd00::1] local l=1", "u2 a/y [10.0.0.2] local l=2"},
			bindings: []string{"c1=u1", "c2=u2"},
		},
		{
			name: "several interfaces of one pod", opts: dir,
			objects: pods("a/x uid=u1"),
			endpoints: []pinning.Endpoint{
				endpoint(2, "c2", "u1", "a/x", nil, "10.1.0.1", "10.0.0.1"),
				endpoint(1, "c1", "u1", "a/x", nil, "10.0.0.1"),
			},
			want:     []string{"u1 a/x [10.0.0.1 10.1.0.1] local"},
			bindings: []string{"c1=u1", "c2=u1"},
		},
		{
			name: "by name when one side has no UID", opts: api,
			objects: pods("a/x label=1", "a/y uid=u2 label=2"),
			endpoints: []pinning.Endpoint{
				endpoint(1, "c1", "u1", "a/x", nil, "10.0.0.1"),
				endpoint(2, "c2", "", "a/y", nil, "10.0.0.2"),
			},
			want:     []string{"a/x a/x [10.0.0.1] local l=1", "u2 a/y [10.0.0.2] local l=2"},
			bindings: []string{"c1=a/x", "c2=u2"},
		},
		{
			name: "another UID is another pod, which waits for its object", opts: api,
			objects:   pods("a/x uid=u1 node=n1"),
			endpoints: []pinning.Endpoint{endpoint(1, "c1", "u2", "a/x", nil, "10.0.0.1"), endpoint(2, "c2", "", "", nil, "10.0.0.2")},
			want:      []string{"u1 a/x [] local"},
		},
		{
			name: "a file describes the pod of its name, whatever its UID", opts: dir,
			objects:   pods("a/x uid=u1 label=1"),
			endpoints: []pinning.Endpoint{endpoint(1, "c1", "u2", "a/x", nil, "10.0.0.1")},
			want:      []string{"u1 a/x [10.0.0.1] local l=1"},
			bindings:  []string{"c1=u1"},
		},
		{
			name: "a UID belongs to the pod of the endpoint's name", opts: api,
			objects:   pods("a/x uid=u1 node=n1"),
			endpoints: []pinning.Endpoint{endpoint(1, "c1", "u1", "a/y", nil, "10.0.0.1"), endpoint(2, "c2", "u1", "", nil, "10.0.0.2")},
			want:      []string{"u1 a/x [10.0.0.2] local"},
			bindings:  []string{"c2=u1"},
		},
		{
			name: "static pods go by the UID of the kubelet", opts: api,
			objects:   pods("a/static uid=api mirror=hash node=n1"),
			endpoints: []pinning.Endpoint{endpoint(1, "c1", "hash", "a/static", nil, "10.0.0.1")},
			want:      []string{"hash a/static [10.0.0.1] local"},
			bindings:  []string{"c1=hash"},
		},
		{
			name: "no pod passes for another by an annotation", opts: api,
			objects: pods("a/forged uid=api1 mirror=u1 node=n1 label=evil", "b/real uid=u1 node=n1",
				"b/static uid=api2 mirror=hash node=n1", "a/forged2 uid=api3 mirror=hash node=n1"),
			endpoints: []pinning.Endpoint{
				endpoint(1, "c1", "u1", "b/real", nil, "10.0.0.1"), endpoint(2, "c2", "api1", "a/forged", nil, "10.0.0.2"),
				endpoint(3, "c3", "hash", "b/static", nil, "10.0.0.3"),
			},
			want: []string{"a/forged a/forged [10.0.0.2] local l=evil", "a/forged2 a/forged2 [] local", "u1 b/real [10.0.0.1] local",
				"b/static b/static [10.0.0.3] local"},
			bindings: []string{"c1=u1", "c2=a/forged", "c3=b/static"},
		},
		{
			name: "pods that are not scheduled are not here", opts: api,
			objects: pods("a/x uid=u1"),
			want:    []string{"u1 a/x []"},
		},
		{
			name: "pods that have ended are not waited for, but while they are attached", opts: api,
			objects:   pods("a/done uid=u1 node=n1 ip=10.0.0.1 phase=Succeeded", "a/failed uid=u2 node=n1 phase=Failed"),
			endpoints: []pinning.Endpoint{endpoint(1, "c1", "u2", "a/failed", nil, "10.0.0.2")},
			want:      []string{"u1 a/done []", "u2 a/failed [10.0.0.2] local"},
			bindings:  []string{"c1=u2"},
		},
		{
			name: "of pods elsewhere the youngest has an address, unless it is going", opts: api,
			objects: pods("a/old uid=u1 node=n2 ip=10.0.0.1 created=2020", "a/new uid=u2 node=n3 ip=10.0.0.1 created=2021",
				"b/old uid=u3 node=n2 ip=10.0.0.2 created=2020", "b/new uid=u4 node=n3 ip=10.0.0.2 created=2021 deleted=true"),
			want:     []string{"u2 a/new [10.0.0.1]", "u1 a/old []", "u4 b/new []", "u3 b/old [10.0.0.2]"},
			problems: []string{"Pod a/old: its address 10.0.0.1 is also that of Pod a/new"},
		},
		{
			name: "endpoints without manifest", opts: dir,
			endpoints: []pinning.Endpoint{
				endpoint(1, "c1", "", "", map[string]string{"l": "cni"}, "10.0.0.1"),
				endpoint(2, "c2", "u2", "b/y", nil, "10.0.0.2"),
				endpoint(3, "c3", "", "b/z", nil, "10.0.0.3"),
			},
			want:     []string{"u2 b/y [10.0.0.2] local", "b/z b/z [10.0.0.3] local", "default/c1 default/c1 [10.0.0.1] local l=cni"},
			bindings: []string{"c1=default/c1", "c2=u2", "c3=b/z"},
		},
		{
			name: "audit of the namespace, and of the pod where it may", opts: Options{Node: "n1", Unlisted: true, AuditPods: true},
			objects: "apiVersion: v1\nkind: Namespace\nmetadata: {name: a, annotations: {podgate.io/audit: \"true\"}}\n" +
				pods("a/x", "b/y audit=true", "b/z"),
			endpoints: []pinning.Endpoint{endpoint(1, "c1", "", "a/unlisted", nil)},
			want:      []string{"a/unlisted a/unlisted [] local audit", "a/x a/x [] local audit", "b/y b/y [] local audit", "b/z b/z [] local"},
			bindings:  []string{"c1=a/unlisted"},
		},
		{
			name: "audit of the pod where it may not", opts: dir,
			objects: "apiVersion: v1\nkind: Namespace\nmetadata: {name: a, annotations: {podgate.io/audit: \"true\"}}\n" +
				pods("a/x audit=true", "b/y audit=true", "b/z node=n2 ip=10.0.0.1 audit=true"),
			want: []string{"a/x a/x [] local audit", "b/y b/y [] local", "b/z b/z [10.0.0.1]"},
			problems: []string{
				"Pod b/y: annotation podgate.io/audit has no effect on a Pod without --audit-pods, only on its Namespace",
			},
		},
		{
			name: "terminated pods have no address, host-network pods no claim to one", opts: dir,
			objects: pods("a/done node=n2 ip=10.0.0.1 phase=Succeeded", "a/host node=n2 ip=10.0.0.1 host=true", "a/x node=n2 ip=10.0.0.1"),
			want:    []string{"a/done a/done []", "a/host a/host [10.0.0.1]", "a/x a/x [10.0.0.1]"},
		},
		{
			name: "a local pod has its address, whoever's status says so", opts: dir,
			objects:   pods("a/old node=n2 ip=10.0.0.1", "a/x"),
			endpoints: []pinning.Endpoint{endpoint(1, "c1", "", "a/x", nil, "10.0.0.1")},
			want:      []string{"a/old a/old []", "a/x a/x [10.0.0.1] local"},
			bindings:  []string{"c1=a/x"},
		},
		{
			name: "of two local pods the latest has the address", opts: dir,
			endpoints: []pinning.Endpoint{
				endpoint(7, "c1", "", "a/new", nil, "10.0.0.1"),
				endpoint(3, "c2", "", "a/old", nil, "10.0.0.1", "10.0.0.2"),
			},
			want:     []string{"a/new a/new [10.0.0.1] local", "a/old a/old [10.0.0.2] local"},
			bindings: []string{"c1=a/new", "c2=a/old"},
			problems: []string{"Pod a/old: its address 10.0.0.1 is also that of Pod a/new"},
		},
		{
			name: "two pods elsewhere, unless one is going", opts: dir,
			objects: pods("a/x node=n2 ip=10.0.0.1", "a/y node=n3 ip=10.0.0.1", "b/x node=n2 ip=10.0.0.2", "b/y node=n2 ip=10.0.0.2 deleted=true"),
			want: []string{"a/x a/x [10.0.0.1]", "a/y a/y [10.0.0.1]",
				"b/x b/x [10.0.0.2]", "b/y b/y [10.0.0.2]"},
			problems: []string{"Pod a/y: its address 10.0.0.1 is also that of Pod a/x"},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			inv := New(tt.opts)
			inv.Apply(source.Batch{Set: decode(t, tt.objects)})
			inv.SetEndpoints(tt.endpoints)
			var problems []string
			for _, p := range inv.Update(policy.NewCompiler()) {
				problems = append(problems, p.Subject+": "+p.Reason)
			}
			var got []string
			for _, p := range inv.Pods() {
				got = append(got, describe(p))
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("pods\n%q, want\n%q", got, tt.want)
			}
			var bindings []string
			for k, pod := range inv.Bindings() {
				bindings = append(bindings, k.ContainerID+"="+string(pod))
			}
			slices.Sort(bindings)
			if !slices.Equal(bindings, tt.bindings) {
				t.Errorf("bindings %q, want %q", bindings, tt.bindings)
			}
			if !slices.Equal(problems, tt.problems) {
				t.Errorf("problems %q, want %q", problems, tt.problems)
			}
		})
	}
}

// TestUpdateIncrementally goes through a history and asks at each step that the
// compiler has what a new one would have.
func TestUpdateIncrementally(t *testing.T) {
	const (
		ns  = "apiVersion: v1\nkind: Namespace\nmetadata: {name: a, labels: {team: %s}}\n"
		web = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: web, namespace: a}\nspec: {podSelector: {}, ingress: [{from: [{namespaceSelector: {matchLabels: {team: red}}}], ports: [{port: %d}]}]}\n"
	)
	type step struct {
		set       string
		gone      []manifest.Key
		endpoints []pinning.Endpoint
	}
	first := endpoint(1, "c1", "", "a/x", nil, "10.0.0.1")
	second := endpoint(2, "c2", "", "a/unlisted", map[string]string{"l": "1"}, "10.0.0.2")
	steps := []step{
		{set: pods("a/x", "b/y ip=10.0.1.1 node=n2")},
		{set: fmt.Sprintf(ns, "red") + "---\n" + fmt.Sprintf(web, 80)},
		{endpoints: []pinning.Endpoint{first}},
		{endpoints: []pinning.Endpoint{first, second}},
		{set: fmt.Sprintf(web, 81), endpoints: []pinning.Endpoint{first, second}},
		{set: fmt.Sprintf(ns, "blue"), endpoints: []pinning.Endpoint{first, second}},
		{set: pods("a/x label=2 uid=u"), endpoints: []pinning.Endpoint{second}},
		{gone: []manifest.Key{{Kind: "Namespace", Name: "a"}, {Kind: "Pod", Namespace: "b", Name: "y"}}},
		{gone: []manifest.Key{{Kind: "NetworkPolicy", Namespace: "a", Name: "web"}, {Kind: "Pod", Namespace: "a", Name: "x"}}},
	}
	opts := Options{Node: "n1", Unlisted: true}
	inv, compiler := New(opts), policy.NewCompiler()
	for i, s := range steps {
		inv.Apply(source.Batch{Set: decode(t, s.set), Gone: s.gone})
		inv.SetEndpoints(s.endpoints)
		inv.Update(compiler)

		fresh, freshCompiler := New(opts), policy.NewCompiler()
		fresh.Apply(source.Batch{Set: contents(inv)})
		fresh.SetEndpoints(s.endpoints)
		fresh.Update(freshCompiler)

		compiler.Compile()
		compiler.Compact()
		got, want := summary(compiler.Snapshot()), summary(freshCompiler.Snapshot())
		if !slices.Equal(got, want) {
			t.Fatalf("step %d: got\n%s\nwant\n%s", i, strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
	}
}

// TestUpdateRandomly goes through random histories of few pods that share few
// names, UIDs and addresses, and asks at each step that pods, bindings, problems
// and what is compiled are those of an inventory that never saw another state.
func TestUpdateRandomly(t *testing.T) {
	for seed := range uint64(50) {
		r := rand.New(rand.NewPCG(seed, 1))
		opts := Options{Node: "n1", Unlisted: r.IntN(2) == 0, AuditPods: r.IntN(2) == 0}
		inv, compiler := New(opts), policy.NewCompiler()
		for step := range 40 {
			inv.Apply(randomBatch(t, r))
			if r.IntN(2) == 0 {
				inv.SetEndpoints(randomEndpoints(r))
			}
			problems := inv.Update(compiler)

			fresh, freshCompiler := New(opts), policy.NewCompiler()
			fresh.Apply(source.Batch{Set: contents(inv)})
			fresh.SetEndpoints(inv.endpoints)
			freshProblems := fresh.Update(freshCompiler)

			if got, want := inv.Pods(), fresh.Pods(); !slices.EqualFunc(got, want, func(a, b policy.Pod) bool { return samePod(&a, &b) }) {
				t.Fatalf("seed %d, step %d: pods\n%v, want\n%v", seed, step, got, want)
			}
			if !maps.Equal(inv.Bindings(), fresh.Bindings()) || !slices.Equal(problems, freshProblems) {
				t.Fatalf("seed %d, step %d: bindings %v, want %v; problems %v, want %v",
					seed, step, inv.Bindings(), fresh.Bindings(), problems, freshProblems)
			}
			compiler.Compile()
			compiler.Compact()
			if got, want := summary(compiler.Snapshot()), summary(freshCompiler.Snapshot()); !slices.Equal(got, want) {
				t.Fatalf("seed %d, step %d: got\n%s\nwant\n%s", seed, step, strings.Join(got, "\n"), strings.Join(want, "\n"))
			}
		}
	}
}

// randomBatch sets and deletes a few of the objects there may be.
func randomBatch(t *testing.T, r *rand.Rand) source.Batch {
	const policies = "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: p%d, namespace: %q, uid: p%d}\n" +
		"spec: {podSelector: {}, ingress: [{from: [{namespaceSelector: {matchLabels: {team: \"%d\"}}, podSelector: {matchLabels: {l: \"%d\"}}}]}]}\n"
	const namespaces = "---\napiVersion: v1\nkind: Namespace\nmetadata: {name: %q, labels: {team: \"%d\"}, annotations: {podgate.io/audit: \"%v\"}}\n"
	var text strings.Builder
	var gone []manifest.Key
	set := make(map[manifest.Key]bool)
	once := func(kind, namespace, name string) bool {
		key := manifest.Key{Kind: kind, Namespace: namespace, Name: name}
		if set[key] {
			return false
		}
		set[key] = true
		if r.IntN(4) == 0 {
			gone = append(gone, key)
			return false
		}
		return true
	}
	for range r.IntN(4) {
		ns := string("ab"[r.IntN(2)])
		switch r.IntN(6) {
		case 0:
			if once("Namespace", "", ns) {
				fmt.Fprintf(&text, namespaces, ns, r.IntN(2), r.IntN(4) == 0)
			}
		case 1:
			n := r.IntN(2)
			if once("NetworkPolicy", ns, fmt.Sprintf("p%d", n)) {
				fmt.Fprintf(&text, policies, n, ns, 2*n+int(ns[0]-'a'), r.IntN(2), r.IntN(2))
			}
		default:
			n := r.IntN(4)
			name := fmt.Sprintf("x%d", n)
			if !once("Pod", ns, name) {
				continue
			}
			// A pod made again has another UID.
			spec := fmt.Sprintf("%s/%s uid=u-%s-%d-%d node=n%d label=%d created=20%02d", ns, name, ns, n, r.IntN(2), r.IntN(3), r.IntN(2), r.IntN(5)+10)
			if r.IntN(2) == 0 {
				spec += fmt.Sprintf(" ip=10.0.0.%d", r.IntN(4)+1)
			}
			for _, word := range []string{"host=true", "phase=Failed", "deleted=true"} {
				if r.IntN(6) == 0 {
					spec += " " + word
				}
			}
			switch r.IntN(8) {
			case 0:
				spec += fmt.Sprintf(" mirror=u-%c-%d-%d", "ab"[r.IntN(2)], r.IntN(4), r.IntN(2))
			case 1:
				spec += " audit=true"
			}
			text.WriteString(pods(spec))
		}
	}
	return source.Batch{Set: decode(t, text.String()), Gone: gone}
}

func randomEndpoints(r *rand.Rand) (out []pinning.Endpoint) {
	for n := range r.IntN(4) {
		ns, pod := string("ab"[r.IntN(2)]), r.IntN(4)
		uid, name := fmt.Sprintf("u-%s-%d-%d", ns, pod, r.IntN(2)), fmt.Sprintf("%s/x%d", ns, pod)
		switch r.IntN(5) {
		case 0:
			uid = ""
		case 1:
			name = "b/x0"
		}
		out = append(out, endpoint(uint32(n+1+r.IntN(2)*10), fmt.Sprintf("c%d", n), uid, name, nil, fmt.Sprintf("10.0.0.%d", r.IntN(4)+1)))
	}
	return out
}

// summary is what an update amounts to for pods and addresses.
func summary(u policy.Update) (out []string) {
	for _, s := range u.Subjects {
		out = append(out, fmt.Sprintf("subject %+v", s))
	}
	for _, p := range u.Peers {
		out = append(out, fmt.Sprintf("peer %+v", p))
	}
	for _, p := range u.Policies {
		out = append(out, fmt.Sprintf("policy %+v", p))
	}
	for _, c := range u.Cells {
		out = append(out, fmt.Sprintf("cell %+v", c))
	}
	slices.Sort(out)
	return out
}

// contents are the objects of an inventory.
func contents(i *Inventory) (out []manifest.Object) {
	for key, o := range i.objects {
		out = append(out, manifest.Object{Key: key, Policy: o.policy, Namespace: o.namespace, Audit: o.audit})
	}
	for _, l := range i.listed {
		o := manifest.Object{
			Key: manifest.Key{Kind: manifest.KindPod, Namespace: l.Namespace, Name: l.Name},
			Pod: l.Pod, Node: map[where]string{here: i.opts.Node, elsewhere: "n2"}[l.where], Mirror: l.mirror, Ended: l.ended,
		}
		if l.created != 0 {
			o.Created = time.Unix(0, l.created)
		}
		out = append(out, o)
	}
	return out
}
