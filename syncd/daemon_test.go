// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package syncd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/podgate/podgate/bpf/policy"
	"github.com/podgate/podgate/pinning"
	"github.com/podgate/podgate/syncd/inventory"
	"github.com/podgate/podgate/syncd/manifest"
	"github.com/podgate/podgate/syncd/metrics"
	"github.com/podgate/podgate/syncd/source"
	"github.com/podgate/podgate/syncd/status"
)

// recorder is a state in which steps can be made to fail. It keeps what it was
// told; the kernel's part is tested with the real one.
type recorder struct {
	mu        sync.Mutex
	endpoints []pinning.Endpoint
	subjects  map[policy.PodKey]policy.Subject
	updates   []policy.Update
	nodeAddrs []netip.Addr
	services  []pinning.Service
	mode      pinning.ServicesMode
	calls     map[string]int
	fail      map[string]error
	changes   chan struct{}
	usage     []pinning.MapUsage
	// short is what finds no room, of any update.
	short error
	// former says that another version is there.
	former bool
}

func newRecorder() *recorder {
	return &recorder{
		subjects: make(map[policy.PodKey]policy.Subject),
		calls:    make(map[string]int),
		fail:     make(map[string]error),
		changes:  make(chan struct{}, 1),
	}
}

// step counts a call and answers the error it is to fail with.
func (r *recorder) step(name string) error {
	r.calls[name]++
	return r.fail[name]
}

func (r *recorder) failing(name string, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.fail[name] = err
}

func (r *recorder) attach(ep pinning.Endpoint) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.endpoints = append(r.endpoints, ep)
	select {
	case r.changes <- struct{}{}:
	default:
	}
}

func (r *recorder) Endpoints() iter.Seq2[pinning.Endpoint, error] {
	r.mu.Lock()
	defer r.mu.Unlock()
	endpoints, err := slices.Clone(r.endpoints), r.step("Endpoints")
	return func(yield func(pinning.Endpoint, error) bool) {
		for _, ep := range endpoints {
			if !yield(ep, nil) {
				return
			}
		}
		if err != nil {
			yield(pinning.Endpoint{}, err)
		}
	}
}

func (r *recorder) Bind(_ context.Context, key pinning.AttachmentKey, pod policy.PodKey) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.step("Bind " + key.ContainerID); err != nil {
		return err
	}
	for i := range r.endpoints {
		if r.endpoints[i].Key == key {
			r.endpoints[i].Pod = pod
		}
	}
	return nil
}

func (r *recorder) Apply(_ context.Context, u policy.Update) (pinning.Applied, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.step("Apply"); err != nil {
		return pinning.Applied{}, err
	}
	r.updates = append(r.updates, u)
	if u.Full {
		clear(r.subjects)
	}
	for _, s := range u.Subjects {
		r.subjects[s.Pod] = s
	}
	for _, k := range u.GoneSubjects {
		delete(r.subjects, k)
	}
	if r.short != nil {
		return pinning.Applied{Problems: []error{r.short}}, nil
	}
	return pinning.Applied{}, nil
}

func (r *recorder) SetNodeAddresses(_ context.Context, addrs []netip.Addr) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.nodeAddrs = addrs
	return r.step("SetNodeAddresses")
}

func (r *recorder) SetServices(_ context.Context, all []pinning.Service) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.services = all
	return r.step("SetServices")
}

func (r *recorder) ServicesMode() (pinning.ServicesMode, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.mode, r.step("ServicesMode")
}

func (r *recorder) MoveBackends(_ context.Context, moved []pinning.Service) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.step("MoveBackends"); err != nil {
		return err
	}
	for _, m := range moved {
		for i := range r.services {
			if slices.Equal(r.services[i].Frontends, m.Frontends) {
				r.services[i].Backends = m.Backends
			}
		}
	}
	return nil
}

func (r *recorder) Repair(context.Context) ([]pinning.Repaired, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return nil, r.step("Repair")
}

func (r *recorder) Upgrade(context.Context) (bool, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return true, r.step("Upgrade")
}

func (r *recorder) Inherit(context.Context) (bool, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.former, r.step("Inherit")
}

func (r *recorder) TakeOver(context.Context) (bool, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	err := r.step("TakeOver")
	r.former = r.former && err != nil
	return r.former, err
}

func (r *recorder) Watch(context.Context) (<-chan struct{}, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.changes, r.step("Watch")
}

func (r *recorder) Enforcement(ep pinning.Endpoint) (pinning.Enforcement, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, known := r.subjects[ep.Pod]; !known {
		return pinning.Enforcement{}, nil
	}
	return pinning.Enforcement{Ingress: pinning.RulesetOpen, Egress: pinning.RulesetOpen}, r.step("Enforcement")
}

func (r *recorder) Usage() ([]pinning.MapUsage, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.usage), r.step("Usage")
}

// feed is a source driven by the test.
type feed struct {
	batches chan source.Batch
	err     error
}

func (f *feed) Load(context.Context) (source.Batch, error) { return <-f.batches, f.err }

func (f *feed) Run(ctx context.Context, deliver func(source.Batch)) error {
	if f.err != nil {
		return f.err
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case b := <-f.batches:
			deliver(b)
		}
	}
}

// bench runs a daemon on a recorder.
type bench struct {
	t       *testing.T
	state   *recorder
	feed    *feed
	addrs   chan []netip.Addr
	metrics *metrics.Daemon

	mu   sync.Mutex
	last status.Status
}

func start(t *testing.T, state *recorder) *bench {
	t.Helper()
	b := &bench{t: t, state: state, feed: &feed{batches: make(chan source.Batch)}, addrs: make(chan []netip.Addr), metrics: metrics.NewDaemon()}
	d := New(Options{
		State: state, Source: b.feed, Inventory: inventory.Options{Node: "n1", Unlisted: true},
		NodeAddresses: func(ctx context.Context, _ *slog.Logger, deliver func([]netip.Addr)) error {
			for {
				select {
				case <-ctx.Done():
					return nil
				case a, ok := <-b.addrs:
					if !ok {
						return errors.New("no netlink")
					}
					deliver(a)
				}
			}
		},
		Report: func(s status.Status) {
			b.mu.Lock()
			defer b.mu.Unlock()
			b.last = s
		},
		Metrics: b.metrics,
		Grace:   10 * time.Millisecond, Retry: 10 * time.Millisecond, Repair: 50 * time.Millisecond,
	})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- d.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return b
}

// until waits for a condition on state and status.
func (b *bench) until(what string, ok func(r *recorder, s status.Status) bool) {
	b.t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for {
		b.mu.Lock()
		b.state.mu.Lock()
		done, s := ok(b.state, b.last), b.last
		b.state.mu.Unlock()
		b.mu.Unlock()
		if done {
			return
		}
		if time.Now().After(deadline) {
			b.t.Fatalf("not %s: status %+v", what, s)
		}
		time.Sleep(time.Millisecond)
	}
}

func (b *bench) set(text string) {
	b.t.Helper()
	objects, err := manifest.Decode("f.yaml", []byte(text))
	if err != nil {
		b.t.Fatal(err)
	}
	b.feed.batches <- source.Batch{Set: objects}
}

func subjectIs(key policy.PodKey, isolated bool) func(*recorder, status.Status) bool {
	return func(r *recorder, _ status.Status) bool {
		s, ok := r.subjects[key]
		return ok && (s.Rulesets[policy.Ingress] != policy.Open) == isolated
	}
}

func hasProblem(text string) func(*recorder, status.Status) bool {
	return func(_ *recorder, s status.Status) bool {
		return slices.ContainsFunc(s.Problems, func(p source.Problem) bool { return strings.Contains(p.Subject+": "+p.Reason, text) })
	}
}

func hasNone(_ *recorder, s status.Status) bool { return len(s.Problems) == 0 && !s.Synced.IsZero() }

func pod(name, label string) string {
	return fmt.Sprintf("apiVersion: v1\nkind: Pod\nmetadata: {namespace: a, name: %q, labels: {l: %q}}\n---\n", name, label)
}

func isolate(label string) string {
	return fmt.Sprintf("apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {namespace: a, name: p}\nspec: {podSelector: {matchLabels: {l: %q}}}\n---\n", label)
}

// attachment of the container c1, c2, … has the address 10.0.0.1, 10.0.0.2, …
func attachment(container, podName string) pinning.Endpoint {
	addr := netip.MustParseAddr("10.0.0." + strings.TrimPrefix(container, "c"))
	ep := pinning.Endpoint{PodNamespace: "a", PodName: podName, Addresses: []netip.Addr{addr}}
	ep.Key = pinning.AttachmentKey{ContainerID: container, IfName: "eth0"}
	return ep
}

func TestRunWaitsForTheSource(t *testing.T) {
	state := newRecorder()
	state.attach(attachment("c1", "x"))
	b := start(t, state)
	b.addrs <- []netip.Addr{netip.MustParseAddr("192.0.2.1")}
	b.until("repairing and knowing the node", func(r *recorder, _ status.Status) bool { return r.calls["Repair"] > 2 && len(r.nodeAddrs) == 1 })
	b.until("untouched", func(r *recorder, s status.Status) bool { return r.calls["Apply"] == 0 && s.Synced.IsZero() })
	b.set(pod("x", "1") + isolate("1"))
	b.until("isolated", subjectIs("a/x", true))
	b.until("bound", func(r *recorder, _ status.Status) bool { return r.endpoints[0].Pod == "a/x" })
	b.until("well", hasNone)
	if !state.updates[0].Full {
		t.Error("the first update is not full")
	}
}

// TestRunWaitsForAllKinds asks that nothing is compiled from a part.
func TestRunWaitsForAllKinds(t *testing.T) {
	state := newRecorder()
	state.attach(attachment("c1", "x"))
	b := start(t, state)
	b.feed.batches <- source.Batch{
		Pending:  []string{manifest.KindNetworkPolicy},
		Problems: []source.Problem{{Subject: "API server", Reason: "slow"}},
	}
	b.until("a problem", hasProblem("slow"))
	b.until("untouched", func(r *recorder, s status.Status) bool { return r.calls["Apply"] == 0 && s.Synced.IsZero() })
	b.set(pod("x", "1") + isolate("1"))
	b.until("isolated", subjectIs("a/x", true))
}

func TestRunFollows(t *testing.T) {
	b := start(t, newRecorder())
	b.set(pod("x", "1"))
	b.until("expected and open", subjectIs("a/x", false))
	b.set(isolate("1"))
	b.until("isolated", subjectIs("a/x", true))
	b.set(pod("x", "2"))
	b.until("open", subjectIs("a/x", false))
	b.state.attach(attachment("c1", "unlisted"))
	b.until("known", subjectIs("a/unlisted", false))
	b.set(isolate(""))
	b.until("open, as it has no such label", subjectIs("a/unlisted", false))
	b.feed.batches <- source.Batch{Gone: []manifest.Key{{Kind: "Pod", Namespace: "a", Name: "x"}}}
	b.until("gone", func(r *recorder, _ status.Status) bool { _, ok := r.subjects["a/x"]; return !ok })
	b.until("well", hasNone)
}

func TestRunRepeatsWhatFailed(t *testing.T) {
	failure := errors.New("out of order")
	state := newRecorder()
	b := start(t, state)
	b.set(pod("x", "1"))
	b.until("open", subjectIs("a/x", false))

	state.failing("Apply", failure)
	b.set(isolate("1"))
	b.until("a problem", hasProblem("kernel state: "+failure.Error()))
	b.until("tried again", func(r *recorder, _ status.Status) bool { return r.calls["Apply"] > 3 })
	b.set(pod("y", "1"))
	state.failing("Apply", nil)
	b.until("isolated", subjectIs("a/x", true))
	b.until("isolated", subjectIs("a/y", true))
	b.until("well", hasNone)
	b.until("a full update after the failure", func(r *recorder, _ status.Status) bool {
		return slices.ContainsFunc(r.updates[1:], func(u policy.Update) bool { return u.Full })
	})
}

// TestRunWithoutRoom asks that what finds no room is put aside: named, with no
// more than a few tries to write everything until something has gone, while the
// rest is kept up to date.
func TestRunWithoutRoom(t *testing.T) {
	state := newRecorder()
	b := start(t, state)
	fulls := func(r *recorder) (n int) {
		for _, u := range r.updates {
			if u.Full {
				n++
			}
		}
		return n
	}
	b.set(pod("x", "1") + strings.ReplaceAll(isolate("1"), "name: p", "name: other"))
	b.until("isolated", subjectIs("a/x", true))
	state.mu.Lock()
	state.short = &pinning.PolicyError{
		Policies: []policy.PolicyInfo{{UID: "NetworkPolicy a/p", Kind: "NetworkPolicy", Namespace: "a", Name: "p"}},
		Err:      fmt.Errorf("its endpoints are closed: %w", pinning.ErrFull),
	}
	state.mu.Unlock()
	b.set(pod("y", "2") + isolate("2"))
	b.until("named", hasProblem("NetworkPolicy a/p: its endpoints are closed: no room"))
	b.until("tried", func(r *recorder, _ status.Status) bool { return fulls(r) == 1+roomTries })
	for i := range 20 {
		name := fmt.Sprintf("more-%d", i)
		b.set(pod(name, "1"))
		b.until("the rest up to date", subjectIs(policy.PodKey("a/"+name), true))
	}
	b.until("put aside, and said", func(r *recorder, s status.Status) bool {
		return fulls(r) == 1+roomTries && hasProblem("NetworkPolicy a/p")(r, s)
	})
	state.mu.Lock()
	state.short = nil
	state.mu.Unlock()
	b.set(pod("last", "1"))
	b.until("up to date", subjectIs("a/last", true))
	b.until("still put aside", func(r *recorder, _ status.Status) bool { return fulls(r) == 1+roomTries })
	b.feed.batches <- source.Batch{Gone: []manifest.Key{{Kind: manifest.KindNetworkPolicy, Namespace: "a", Name: "other"}}}
	b.until("well", hasNone)
	b.until("tried again", func(r *recorder, _ status.Status) bool { return fulls(r) > 1+roomTries })
}

// TestRunWithoutRoomFromTheStart asks that a daemon that never had room for all
// is known to be one that enforces the rest.
func TestRunWithoutRoomFromTheStart(t *testing.T) {
	state := newRecorder()
	state.failing("Apply", errors.New("out of order"))
	b := start(t, state)
	b.set(pod("x", "1") + isolate("1"))
	b.until("a problem", hasProblem("out of order"))
	b.until("not applied", func(_ *recorder, s status.Status) bool { return s.Applied.IsZero() })
	state.mu.Lock()
	state.fail, state.short = map[string]error{}, fmt.Errorf("peers: %w", pinning.ErrFull)
	state.mu.Unlock()
	b.until("applied", func(_ *recorder, s status.Status) bool { return !s.Applied.IsZero() })
	b.until("said", hasProblem("peers: no room"))
	b.until("not synced", func(_ *recorder, s status.Status) bool { return s.Synced.IsZero() })
}

func TestRunGoesOn(t *testing.T) {
	for _, step := range []string{"Upgrade", "Watch", "Repair", "SetNodeAddresses", "Endpoints", "Bind c1"} {
		t.Run(step, func(t *testing.T) {
			state := newRecorder()
			state.failing(step, errors.New("out of order"))
			state.attach(attachment("c1", "x"))
			state.attach(attachment("c2", "y"))
			b := start(t, state)
			b.addrs <- []netip.Addr{netip.MustParseAddr("192.0.2.1")}
			b.until("a problem", func(r *recorder, s status.Status) bool {
				return step == "Endpoints" || step == "Bind c1" || hasProblem("out of order")(r, s)
			})
			b.set(pod("x", "1") + pod("y", "1") + isolate("1"))
			b.until("a problem", hasProblem("out of order"))
			if step == "Endpoints" {
				b.until("untouched", func(r *recorder, _ status.Status) bool { return r.calls["Apply"] == 0 })
			} else {
				b.until("isolated", subjectIs("a/x", true))
				b.until("isolated", subjectIs("a/y", true))
			}
			if step == "Upgrade" {
				return // not tried again before the next start
			}
			state.failing(step, nil)
			b.until("well", hasNone)
			b.until("bound", func(r *recorder, _ status.Status) bool {
				return r.endpoints[0].Pod == "a/x" && r.endpoints[1].Pod == "a/y"
			})
		})
	}
}

// TestRunTakesOver asks that endpoints of another version stay with it until all
// is applied that decides about them.
func TestRunTakesOver(t *testing.T) {
	state := newRecorder()
	state.former = true
	state.attach(attachment("c1", "x"))
	state.failing("Apply", errors.New("out of order"))
	b := start(t, state)
	b.addrs <- []netip.Addr{netip.MustParseAddr("192.0.2.1")}
	b.set(pod("x", "1") + isolate("1"))
	b.until("failed", func(r *recorder, _ status.Status) bool { return r.calls["Apply"] > 1 && r.calls["Inherit"] > 0 })
	b.until("not taken over", func(r *recorder, _ status.Status) bool { return r.calls["TakeOver"] == 0 })
	state.failing("TakeOver", errors.New("held up"))
	state.failing("Apply", nil)
	b.until("a problem", hasProblem("held up"))
	state.failing("TakeOver", nil)
	b.until("taken over", func(r *recorder, _ status.Status) bool { return !r.former })
	b.until("well", hasNone)
}

// TestRunTellsServices asks that Services wait until all of them and the node's
// addresses are known, and are told again when they found no room.
func TestRunTellsServices(t *testing.T) {
	state := newRecorder()
	state.failing("SetServices", errors.Join(errors.New("service a/x: full"), errors.New("service a/y: full")))
	b := start(t, state)
	service := manifest.Object{
		Key: manifest.Key{Kind: manifest.KindService, Namespace: "a", Name: "x"},
		Service: &manifest.Service{
			Namespace: "a", Name: "x", Addresses: []netip.Addr{netip.MustParseAddr("10.96.0.1"), netip.MustParseAddr("fd00::1")},
			Ports: []manifest.ServicePort{{Protocol: policy.TCP, Port: 80, NodePort: 30080}},
		},
	}
	told := func(want string) func(*recorder, status.Status) bool {
		return func(r *recorder, _ status.Status) bool {
			var got []string
			for _, s := range r.services {
				got = append(got, fmt.Sprint(s.Frontends))
			}
			return strings.Join(got, " ") == want
		}
	}
	b.addrs <- []netip.Addr{netip.MustParseAddr("192.0.2.1")}
	b.feed.batches <- source.Batch{Set: []manifest.Object{service}, Pending: []string{manifest.KindEndpointSlice}}
	b.until("synced without Services", hasNone)
	b.until("not told", func(r *recorder, _ status.Status) bool { return r.calls["SetServices"] == 0 })
	b.feed.batches <- source.Batch{}
	b.until("told", told("[10.96.0.1:80 192.0.2.1:30080] [[fd00::1]:80]"))
	b.until("a problem", hasProblem("services: service a/x: full"))
	b.until("another", hasProblem("services: service a/y: full"))
	b.until("told again", func(r *recorder, _ status.Status) bool { return r.calls["SetServices"] > 1 })
	state.failing("SetServices", nil)
	b.until("well", hasNone)
	b.addrs <- []netip.Addr{netip.MustParseAddr("192.0.2.2")}
	b.until("told the new address", told("[10.96.0.1:80 192.0.2.2:30080] [[fd00::1]:80]"))

	// The veth of a pod that starts changes nothing, unless packets are judged
	// before they are translated.
	veth := netip.MustParseAddr("fe80::1")
	state.mu.Lock()
	state.mode = pinning.ServicesAfter
	calls, repairs := state.calls["SetServices"], state.calls["Repair"]
	state.mu.Unlock()
	b.addrs <- []netip.Addr{netip.MustParseAddr("192.0.2.2"), veth}
	b.until("the node's address", func(r *recorder, _ status.Status) bool { return slices.Contains(r.nodeAddrs, veth) })
	b.until("nothing told", func(r *recorder, _ status.Status) bool {
		return r.calls["Repair"] > repairs+2 && r.calls["SetServices"] == calls
	})
	state.failing("ServicesMode", errors.New("out of order"))
	b.until("a problem", hasProblem("services: out of order"))
	state.failing("ServicesMode", nil)
	b.until("well", hasNone)
	state.mu.Lock()
	state.mode = pinning.ServicesBefore
	state.mu.Unlock()
	b.until("told all addresses", told("[10.96.0.1:80 192.0.2.2:30080] [[fd00::1]:80 [fe80::1]:30080]"))
	b.until("well", hasNone)
	b.feed.batches <- source.Batch{Gone: []manifest.Key{service.Key}}
	b.until("told that it is gone", told(""))
}

func TestRunWithoutNetlink(t *testing.T) {
	b := start(t, newRecorder())
	close(b.addrs)
	b.until("a problem", hasProblem("no netlink"))
	b.set(pod("x", "1") + isolate("1"))
	b.until("isolated", subjectIs("a/x", true))
}

func TestRunWithoutSource(t *testing.T) {
	d := New(Options{State: newRecorder(), Source: &feed{err: errors.New("no directory")},
		NodeAddresses: func(ctx context.Context, _ *slog.Logger, _ func([]netip.Addr)) error {
			<-ctx.Done()
			return nil
		}})
	if err := d.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "no directory") {
		t.Errorf("Run: %v", err)
	}
}

// TestManyProblems asks that a flood of them stays readable, and is the same one
// when it comes in another order.
func TestManyProblems(t *testing.T) {
	var told []source.Problem
	p := newProblems(slog.New(slog.DiscardHandler), func(one source.Problem) { told = append(told, one) })
	var flood []source.Problem
	for i := range 100_000 {
		flood = append(flood, source.Problem{Subject: "kernel state", Reason: fmt.Sprintf("no room for %06d", i)})
	}
	p.replace("apply", flood)
	slices.Reverse(flood)
	p.replace("apply", flood)
	if got := p.list(); len(got) != most+1 || len(told) != most+1 ||
		got[0].Reason != "no room for 000000" || got[most].Reason != "and 99980 more problems like these" {
		t.Errorf("%d problems, %d told: %v", len(got), len(told), got)
	}
	if p.replace("apply", nil); len(p.list()) > 0 {
		t.Errorf("problems %v", p.list())
	}
}

// TestSameProblemTwice asks that a problem that two things have alike is told
// once, and not again while it stands.
func TestSameProblemTwice(t *testing.T) {
	told := 0
	p := newProblems(slog.New(slog.DiscardHandler), func(source.Problem) { told++ })
	same := source.Problem{Subject: "endpoints", Reason: "unreadable"}
	for range 3 {
		p.replace("endpoints", []source.Problem{same, same})
	}
	if got := p.list(); len(got) != 1 || told != 1 {
		t.Errorf("%d problems, told %d times: %v", len(got), told, got)
	}
}

// TestMetrics asks that what the status says can be alerted on.
func TestMetrics(t *testing.T) {
	state := newRecorder()
	state.usage = []pinning.MapUsage{{Name: "cells", Used: 7, Max: 8}, {Name: "gates", Used: -1, Max: 8}}
	state.attach(attachment("c1", "x"))
	state.attach(attachment("c2", "y"))
	b := start(t, state)
	b.set(pod("x", "1"))
	b.until("well", hasNone)
	state.failing("Apply", errors.New("out of order"))
	objects, err := manifest.Decode("b.yaml", []byte(isolate("1")))
	if err != nil {
		t.Fatal(err)
	}
	b.feed.batches <- source.Batch{Set: objects, Problems: []source.Problem{{Subject: "/p/a.yaml", Reason: "broken"}}}
	b.until("named", hasProblem("/p/a.yaml: broken"))
	b.until("not applied", hasProblem("out of order"))

	registry := prometheus.NewRegistry()
	if err := registry.Register(b.metrics); err != nil {
		t.Fatal(err)
	}
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, f := range families {
		for _, m := range f.GetMetric() {
			for _, l := range m.GetLabel() {
				got = append(got, fmt.Sprintf("%s{%s=%s} %v", f.GetName(), l.GetName(), l.GetValue(), m.GetGauge().GetValue()+m.GetCounter().GetValue()))
			}
		}
	}
	for _, want := range []string{
		"podgate_sync_problems{subject=/p/a.yaml} 1", "podgate_sync_objects{kind=pod} 2",
		"podgate_sync_revisions_total{step=received} 2", "podgate_sync_revisions_total{step=applied} 1",
		"podgate_endpoints{state=open} 2", "podgate_endpoints{state=closed} 0",
		"podgate_map_entries{map=cells} 7", "podgate_map_max_entries{map=cells} 8",
	} {
		if !slices.Contains(got, want) {
			t.Errorf("no %s in %q", want, got)
		}
	}
	if slices.ContainsFunc(got, func(s string) bool { return strings.Contains(s, "map=gates") }) {
		t.Errorf("an array has entries in %q", got)
	}
}

// TestFill asks that each threshold a map crosses is logged once.
func TestFill(t *testing.T) {
	var log bytes.Buffer
	f := newFill(slog.New(slog.NewTextHandler(&log, nil)))
	for i, tt := range []struct {
		used int
		want string // level logged, if any
	}{
		{79, ""}, {80, "WARN"}, {94, ""}, {95, "ERROR"}, {100, ""}, {90, "WARN"}, {80, ""}, {79, "INFO"}, {10, ""}, {99, "ERROR"},
	} {
		log.Reset()
		f.look(t.Context(), []pinning.MapUsage{
			{Name: "cells", Used: tt.used, Max: 100}, {Name: "flows", Used: 20, Max: 100, Evicts: true}, {Name: "gates", Used: -1, Max: 100},
		})
		_, got, _ := strings.Cut(log.String(), "level=")
		level, rest, _ := strings.Cut(got, " ")
		if level != tt.want || strings.Contains(rest, "level=") || level != "" && !strings.Contains(rest, fmt.Sprintf("map=cells used=%d max=100", tt.used)) {
			t.Errorf("step %d, %d used: logged %q, want %s", i, tt.used, log.String(), tt.want)
		}
	}
}
