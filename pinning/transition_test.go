// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package pinning_test

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/podgate/podgate/bpf"
	"github.com/podgate/podgate/bpf/policy"
	"github.com/podgate/podgate/pinning"
)

var transitionSeed = flag.Uint64("transition-seed", 0, "seed of TestTransitions; 0 takes the time")

// question is one cell of the reachability matrix, as the kernel is asked.
type question struct {
	pod   int
	dir   policy.Direction
	peer  netip.Addr
	proto policy.Protocol
	port  uint16
}

// world is a small cluster whose policy changes at random.
type world struct {
	rand      *rand.Rand
	pods      []policy.Pod
	policies  []policy.Policy
	questions []question
}

func newWorld(r *rand.Rand) *world {
	w := &world{rand: r}
	for i := range 10 {
		w.pods = append(w.pods, policy.Pod{
			Key: policy.PodKey(fmt.Sprintf("uid-%d", i)), Namespace: fmt.Sprintf("ns%d", i%2), Name: fmt.Sprintf("pod%d", i),
			Addresses: []netip.Addr{netip.AddrFrom4([4]byte{10, 0, byte(i % 3), byte(10 + i)})},
			Local:     i < 4,
			Ports:     []policy.NamedPort{{Name: "web", Protocol: policy.TCP, Port: 80}},
		})
		w.relabel(i)
	}
	w.policies = make([]policy.Policy, 4)
	for i := range w.policies {
		w.rewrite(i)
	}
	peers := []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("10.0.1.200")}
	for _, p := range w.pods {
		peers = append(peers, p.Addresses...)
	}
	for pod := range 4 {
		for _, dir := range []policy.Direction{policy.Ingress, policy.Egress} {
			for _, peer := range peers {
				for _, port := range []uint16{80, 81, 443} {
					w.questions = append(w.questions, question{pod, dir, peer, policy.TCP, port})
				}
				w.questions = append(w.questions, question{pod, dir, peer, policy.UDP, 53})
			}
		}
	}
	return w
}

func (w *world) relabel(i int) {
	w.pods[i].Labels = map[string]string{"app": string(rune('x' + w.rand.IntN(3)))}
}

// rewrite makes a policy anew: another subject, other peers, other ports.
func (w *world) rewrite(i int) {
	apps := func() policy.Selector {
		op := policy.In
		if w.rand.IntN(4) == 0 {
			op = policy.NotIn
		}
		return policy.Selector{{Key: "app", Operator: op, Values: []string{string(rune('x' + w.rand.IntN(3)))}}}
	}
	p := policy.Policy{
		UID: fmt.Sprintf("policy-%d", i), Kind: "NetworkPolicy", Namespace: fmt.Sprintf("ns%d", i%2), Name: fmt.Sprintf("p%d", i),
		Tier: policy.TierNamespace, Subject: policy.PodSelector{Namespace: fmt.Sprintf("ns%d", i%2), Pods: apps()},
	}
	for _, dir := range []policy.Direction{policy.Ingress, policy.Egress} {
		p.Isolates[dir] = w.rand.IntN(3) > 0
		for range w.rand.IntN(3) {
			if p.Isolates[dir] {
				p.Rules[dir] = append(p.Rules[dir], w.rule(apps))
			}
		}
	}
	w.policies[i] = p
}

func (w *world) rule(apps func() policy.Selector) policy.Rule {
	rule := policy.Rule{Action: policy.Allow, AnyPort: w.rand.IntN(3) == 0}
	switch w.rand.IntN(4) {
	case 0:
		rule.AnyPeer = true
	case 1:
		rule.Peers = []policy.Peer{{Block: &policy.Block{
			CIDR:   netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, byte(w.rand.IntN(3)), 0}), 8+8*w.rand.IntN(3)),
			Except: []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, byte(w.rand.IntN(3)), 8}), 29)},
		}}}
		if b := rule.Peers[0].Block; !b.CIDR.Contains(b.Except[0].Addr()) {
			b.Except = nil
		}
	default:
		rule.Peers = []policy.Peer{{Pods: &policy.PodSelector{Namespace: fmt.Sprintf("ns%d", w.rand.IntN(2)), Pods: apps()}}}
	}
	first := uint16(80 + w.rand.IntN(2))
	rule.Ports = []policy.Port{
		{Protocol: policy.TCP, First: first, Last: first + uint16(w.rand.IntN(2)*400)},
		{Protocol: policy.TCP, Name: "web"},
		{Protocol: policy.UDP, First: 53, Last: 53},
	}[w.rand.IntN(3):]
	return rule
}

// step changes something: one thing an update, so that there is an old and a
// new policy and nothing in between.
func (w *world) step(c *policy.Compiler) error {
	if w.rand.IntN(3) == 0 {
		i := w.rand.IntN(len(w.pods))
		w.relabel(i)
		return c.SetPod(w.pods[i])
	}
	i := w.rand.IntN(len(w.policies))
	w.rewrite(i)
	return c.SetPolicy(w.policies[i])
}

func (w *world) compiler(t *testing.T) *policy.Compiler {
	t.Helper()
	c := policy.NewCompiler()
	for i := range 2 {
		c.SetNamespace(policy.Namespace{Name: fmt.Sprintf("ns%d", i)})
	}
	for _, p := range w.pods {
		if err := c.SetPod(p); err != nil {
			t.Fatal(err)
		}
	}
	for _, p := range w.policies {
		if err := c.SetPolicy(p); err != nil {
			t.Fatal(err)
		}
	}
	return c
}

func (w *world) verdicts(t *testing.T, c *policy.Compiler) []policy.Action {
	t.Helper()
	out := make([]policy.Action, len(w.questions))
	for i, q := range w.questions {
		v, err := c.Judge(q.dir, w.pods[q.pod].Key, q.peer, q.proto, q.port)
		if err != nil {
			t.Fatal(err)
		}
		out[i] = v.Action
	}
	return out
}

// truth is what a probe may answer at a moment.
type truth struct {
	step          string
	before, after []policy.Action
}

// TestTransitions asks the kernel without a pause while policies and labels
// change and the writer restarts, now and then with a policy that changed
// while nobody was there: each answer is that of the old or of the new policy.
func TestTransitions(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("loads eBPF programs: needs root")
	}
	seed := *transitionSeed
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())
	}
	t.Logf("-transition-seed=%d", seed)
	w := newWorld(rand.New(rand.NewPCG(seed, 1)))
	ctx := t.Context()
	options := pinning.Options{Layout: pinning.Layout{BPFFS: mountedBPFFS(t)}, Capacity: pinning.Capacity{Flows: 1024, EventBytes: 4096}}
	state, err := pinning.Ensure(ctx, options)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = state.Close() }()
	compiler := w.compiler(t)
	apply(t, state, compiler.Compile())
	gates := w.gates(t, state)

	var now atomic.Pointer[truth]
	settled := w.verdicts(t, compiler)
	now.Store(&truth{"settled", settled, settled})
	asked := startAsking(t, options, w.questions, gates, &now)

	for i := range 120 {
		if err := w.step(compiler); err != nil {
			t.Fatal(err)
		}
		restart := i%10 == 9
		if restart {
			if err := state.Close(); err != nil {
				t.Fatal(err)
			}
			if state, err = pinning.Open(ctx, options); err != nil {
				t.Fatal(err)
			}
			compiler = w.compiler(t)
		}
		update := compiler.Compile()
		next := w.verdicts(t, compiler)
		now.Store(&truth{fmt.Sprintf("step %d, restart %v", i, restart), settled, next})
		apply(t, state, update)
		settled = next
		now.Store(&truth{"settled", settled, settled})
		if i%7 == 0 {
			apply(t, state, compiler.Compact())
		}
		if i%30 == 0 {
			time.Sleep(1100 * time.Millisecond) // past the grace, so that the next update sweeps
		}
	}
	if n := asked(); n < 10_000 {
		t.Errorf("only %d questions were asked", n)
	}
}

// gates of the local pods, on real veths of a namespace of their own.
func (w *world) gates(t *testing.T, s *pinning.State) []uint32 {
	t.Helper()
	gates := make([]uint32, 4)
	inNewNetNS(t, func() error {
		for i := range gates {
			name := fmt.Sprintf("host%d", i)
			veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: fmt.Sprintf("pod%d", i)}
			if err := netlink.LinkAdd(veth); err != nil {
				return err
			}
			link, err := netlink.LinkByName(name)
			if err != nil {
				return err
			}
			e, _, err := s.Add(t.Context(), pinning.AddRequest{Endpoint: pinning.Endpoint{
				Key:         pinning.AttachmentKey{ContainerID: name, IfName: "eth0"},
				HostIfindex: link.Attrs().Index, MAC: link.Attrs().HardwareAddr,
				PodUID: string(w.pods[i].Key), Addresses: w.pods[i].Addresses,
			}})
			if err != nil {
				return err
			}
			gates[i] = e.Gate
		}
		return nil
	})
	return gates
}

// inNewNetNS runs f on a thread in a new network namespace that lives as long
// as the test.
func inNewNetNS(t *testing.T, f func() error) {
	t.Helper()
	failed := make(chan error, 1)
	go func() {
		// Never unlocked: the thread ends with the goroutine, in its namespace.
		runtime.LockOSThread()
		ns, err := netns.New()
		if err != nil {
			failed <- err
			return
		}
		t.Cleanup(func() { _ = ns.Close() })
		failed <- f()
	}()
	if err := <-failed; err != nil {
		t.Fatal(err)
	}
}

// startAsking probes in the background until the returned function is called,
// which returns how many answers were checked.
func startAsking(t *testing.T, o pinning.Options, questions []question, gates []uint32, now *atomic.Pointer[truth]) func() int {
	t.Helper()
	state, err := pinning.Open(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	checked := make(chan int)
	go func() {
		n := 0
		for i := 0; ctx.Err() == nil; i = (i + 1) % len(questions) {
			q := questions[i]
			was := now.Load()
			answer, err := state.Probe(ctx, pinning.ProbeRequest{
				Gate: gates[q.pod], Direction: q.dir, Local: localOf(q), Peer: q.peer, Protocol: q.proto, Port: q.port,
			})
			if err != nil {
				t.Error(err)
				break
			}
			if now.Load() != was {
				continue // the question fell between two truths
			}
			n++
			allowed := answer.Verdict == bpf.DatapathVerdictVERDICT_ALLOWED
			if allowed != (was.before[i] == policy.Allow) && allowed != (was.after[i] == policy.Allow) {
				t.Errorf("%s: %+v: the kernel says %+v, old policy %v, new policy %v", was.step, q, answer, was.before[i], was.after[i])
			}
		}
		checked <- n
	}()
	return func() int {
		cancel()
		n := <-checked
		if err := state.Close(); err != nil {
			t.Error(err)
		}
		return n
	}
}

func localOf(q question) netip.Addr {
	return netip.AddrFrom4([4]byte{10, 0, byte(q.pod % 3), byte(10 + q.pod)})
}

func apply(t *testing.T, s *pinning.State, u policy.Update) {
	t.Helper()
	done, err := s.Apply(t.Context(), u)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range done.Problems {
		t.Error(p)
	}
}

// mountedBPFFS is a BPF file system of the test's own.
func mountedBPFFS(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "podgate-bpffs-")
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("bpf", dir, "bpf", 0, "mode=0700"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
		if err := os.Remove(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}
