// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package oracle

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/podgate/podgate/bpf/policy"
	"github.com/podgate/podgate/pinning"
	"github.com/podgate/podgate/test/netlab"
	"github.com/podgate/podgate/test/oracle/cases"
)

const (
	// Cases that real pods play, and the connections that are tried in each
	// step: as many that must come about as must not, where there are.
	cyclonusOnSockets  = 16
	randomOnSockets    = 8
	connectionsPerStep = 80

	// silence is how long a connection is waited for: policy drops without a
	// word. One that must come about gets a second try with patience, so that a
	// busy machine fails no test.
	silence  = 300 * time.Millisecond
	patience = 5 * time.Second
)

// served are the ports on which every pod answers: what the cases' policies
// name, and neighbours of it.
var served = []uint16{1, 53, 79, 80, 81, 82, 443, 8080, 8081, 65535}

// TestSockets plays some of the cases with real pods: podgate-cni gates them
// once, then the policy around them changes, and TCP and UDP sockets in their
// namespaces have to agree with the compiler.
func TestSockets(t *testing.T) {
	first := *seed
	if first == 0 {
		first = rand.Uint64()
	}
	t.Logf("to see this again: -args -seed %d", first)
	ipv4, ipv6, err := cases.Cyclonus()
	if err != nil {
		t.Fatal(err)
	}
	n := newSocketNode(t)
	all := append(ipv4, ipv6...)
	for i, number := range rand.New(rand.NewPCG(first, 0)).Perm(len(all))[:cyclonusOnSockets] {
		c, r := all[number], rand.New(rand.NewPCG(first, 1+uint64(i)))
		t.Run("cyclonus/"+c.Name, func(t *testing.T) { n.check(t, c, r) })
	}
	for i := range uint64(randomOnSockets) {
		r := rand.New(rand.NewPCG(first+i, 0))
		t.Run("random/"+fmt.Sprint(first+i), func(t *testing.T) { n.check(t, cases.Random(r), r) })
	}
	t.Logf("connections tried: %v", n.tried)
	for _, proto := range []corev1.Protocol{corev1.ProtocolTCP, corev1.ProtocolUDP} {
		for _, family := range []int{4, 6} {
			for _, allowed := range []bool{true, false} {
				if k := (kind{proto, family, allowed}); n.tried[k] == 0 {
					t.Errorf("nothing of the kind %+v was tried", k)
				}
			}
		}
	}
}

// kind of a connection: what the cases must not leave out.
type kind struct {
	protocol corev1.Protocol
	family   int
	allowed  bool
}

// socketNode is a node with pods at the addresses that the cases' pods have.
type socketNode struct {
	kernel
	pods  map[netip.Addr]*netlab.Pod
	tried map[kind]int
}

func newSocketNode(t *testing.T) *socketNode {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("network namespaces and eBPF need root")
	}
	node, err := netlab.New(netlab.Options{Plugins: buildPlugins(t)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := node.Close(); err != nil {
			t.Error(err)
		}
	})
	state, err := pinning.Ensure(t.Context(), pinning.Options{Layout: pinning.Layout{BPFFS: node.BPFFS}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := state.Close(); err != nil {
			t.Error(err)
		}
	})
	n := &socketNode{kernel: kernel{state: state}, pods: map[netip.Addr]*netlab.Pod{}, tried: map[kind]int{}}
	n.addPods(t, node)
	return n
}

// buildPlugins fills a directory with the CNI plugins.
func buildPlugins(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	here, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	t.Chdir("../..") // the module of what is built
	if err := netlab.Build(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	t.Chdir(here)
	return dir
}

// addPods makes a pod for each address that pods of the cases have. It is known
// by a UID alone, so that it can be a pod of any name.
func (n *socketNode) addPods(t *testing.T, node *netlab.Node) {
	t.Helper()
	// Pods of random cases have addresses from the first on, where the gateway
	// would be. No case has more than a dozen.
	bridge := node.Bridge("br0")
	bridge["ipam"] = node.HostLocal().With(netlab.Plugin{"ranges": [][]netlab.Plugin{
		{{"subnet": "10.244.0.0/24", "gateway": "10.244.0.254"}},
		{{"subnet": "fd00:10:244::/64", "gateway": "fd00:10:244::fffe"}},
	}})
	list := netlab.Conflist{CNIVersion: "1.1.0", Name: "pods", Plugins: []netlab.Plugin{bridge, node.Podgate()}}
	for i := range 12 {
		pod, result, err := node.AddPod(t.Context(), list, netlab.PodSpec{Namespace: "lab", Name: "pod", UID: fmt.Sprint("uid-", i)})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := node.DelPod(context.Background(), pod); err != nil {
				t.Error(err)
			}
		})
		for _, ip := range result.IPs {
			a, _ := netip.AddrFromSlice(ip.Address.IP)
			n.pods[a.Unmap()] = pod
		}
		for _, port := range served {
			serve(t, pod, port)
		}
	}
}

// serve answers on a TCP and a UDP port with what was sent.
func serve(t *testing.T, pod *netlab.Pod, port uint16) {
	t.Helper()
	address := net.JoinHostPort("", strconv.Itoa(int(port)))
	var stream net.Listener
	var datagrams net.PacketConn
	err := pod.Do(func() (err error) {
		if stream, err = net.Listen("tcp", address); err != nil {
			return err
		}
		t.Cleanup(func() { stream.Close() })
		if datagrams, err = net.ListenPacket("udp", address); err != nil {
			return err
		}
		t.Cleanup(func() { datagrams.Close() })
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			c, err := stream.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				_, _ = io.Copy(c, c) // the client misses what is not answered
			}()
		}
	}()
	go func() {
		b := make([]byte, 64)
		for {
			size, client, err := datagrams.ReadFrom(b)
			if err != nil {
				return
			}
			_, _ = datagrams.WriteTo(b[:size], client)
		}
	}()
}

// check takes the node through the steps of a case, as its daemon would that
// has just been restarted.
func (n *socketNode) check(t *testing.T, c cases.Case, r *rand.Rand) {
	t.Helper()
	n.compiler = policy.NewCompiler()
	var before cases.Cluster
	for i, cluster := range c.Steps {
		cluster = n.place(t, cluster)
		if err := cases.Load(n.compiler, before, cluster); err != nil {
			t.Fatalf("step %d: %v", i, err)
		}
		before = cluster
		n.apply(t, n.compiler.Compile())
		if i%2 == 1 {
			n.apply(t, n.compiler.Compact())
		}
		n.tryAll(t, i, n.sample(t, cluster, r))
		if t.Failed() {
			t.Fatalf("policies: %+v", cluster.Policies)
		}
	}
}

// place makes the pods of a cluster be the node's.
func (n *socketNode) place(t *testing.T, c cases.Cluster) cases.Cluster {
	t.Helper()
	c.Pods = slices.Clone(c.Pods)
	for i, pod := range c.Pods {
		for _, a := range cases.Addresses(pod) {
			there := n.pods[a]
			if there == nil {
				t.Fatalf("no pod at %s for %s/%s", a, pod.Namespace, pod.Name)
			}
			pod = pod.DeepCopy()
			pod.UID = types.UID(there.UID)
		}
		c.Pods[i] = pod
	}
	return c
}

// connection is asked for by its client's egress.
type connection struct {
	cases.Question
	allowed bool
}

func (c connection) kind() kind {
	family := 6
	if c.Peer.Is4() {
		family = 4
	}
	return kind{c.Protocol, family, c.allowed}
}

// sample is connections between two pods of a cluster: egress of the one and
// ingress of the other must allow them.
func (n *socketNode) sample(t *testing.T, c cases.Cluster, r *rand.Rand) []connection {
	t.Helper()
	judge := func(d policy.Direction, subject *corev1.Pod, peer netip.Addr, q cases.Question) bool {
		v, err := n.compiler.Judge(d, cases.Key(subject), peer, q.Number(), q.Port)
		if err != nil {
			t.Fatal(err)
		}
		return v.Action == policy.Allow
	}
	var all []connection
	for q := range c.Questions() {
		server := c.PodAt(q.Peer)
		if q.Direction != policy.Egress || server == nil || q.Self() ||
			q.Protocol == corev1.ProtocolSCTP || !slices.Contains(served, q.Port) {
			continue
		}
		allowed := judge(policy.Egress, q.Subject, q.Peer, q) && judge(policy.Ingress, server, q.Local, q)
		all = append(all, connection{q, allowed})
	}
	r.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	left := map[bool]int{true: connectionsPerStep / 2, false: connectionsPerStep / 2}
	return slices.DeleteFunc(all, func(c connection) bool {
		left[c.allowed]--
		return left[c.allowed] < 0
	})
}

// tryAll makes connections all at once.
func (n *socketNode) tryAll(t *testing.T, step int, list []connection) {
	t.Helper()
	var all sync.WaitGroup
	for _, c := range list {
		n.tried[c.kind()]++
		all.Go(func() {
			got, err := n.answers(c.Question, silence)
			if err == nil && !got && c.allowed {
				got, err = n.answers(c.Question, patience)
			}
			if err != nil || got != c.allowed {
				t.Errorf("step %d: %v: answered is %v (%v), the compiler says %v", step, c, got, err, c.allowed)
			}
		})
	}
	all.Wait()
}

// answers tells whether a connection comes about; that it does not is silence,
// any other failure an error.
func (n *socketNode) answers(q cases.Question, timeout time.Duration) (bool, error) {
	deadline := time.Now().Add(timeout)
	var c net.Conn
	err := n.pods[q.Local].Do(func() (err error) {
		dialer := net.Dialer{Deadline: deadline}
		c, err = dialer.Dial(strings.ToLower(string(q.Protocol)), netip.AddrPortFrom(q.Peer, q.Port).String())
		return err
	})
	if err != nil {
		return false, ignoreTimeout(err)
	}
	defer c.Close()
	if q.Protocol == corev1.ProtocolTCP {
		// It is established: what it carries must not get lost any more.
		deadline = time.Now().Add(patience)
	}
	if err := c.SetDeadline(deadline); err != nil {
		return false, err
	}
	sent := []byte("anybody there?")
	received := make([]byte, len(sent))
	if _, err = c.Write(sent); err == nil {
		_, err = io.ReadFull(c, received)
	}
	switch {
	case err != nil && q.Protocol == corev1.ProtocolTCP:
		return true, err
	case err != nil:
		return false, ignoreTimeout(err)
	case !bytes.Equal(sent, received):
		return true, fmt.Errorf("the answer is %q", received)
	}
	return true, nil
}

func ignoreTimeout(err error) error {
	if e := net.Error(nil); errors.As(err, &e) && e.Timeout() {
		return nil
	}
	return err
}
