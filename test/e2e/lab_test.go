// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package e2e

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"
	core "k8s.io/api/core/v1"
	networking "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/rand"
	"sigs.k8s.io/yaml"

	"github.com/podgate/podgate/test/e2e/build"
)

const (
	// patience is how long the cluster may take for what it does by itself, such
	// as to start a pod on a busy machine.
	patience = 90 * time.Second
	// inForce is how long a change may take until packets notice it: the kernel
	// that enforces policy, or kube-proxy that translates a Service.
	inForce = 20 * time.Second
)

// lab is a namespace of a test, or several, that are deleted with it.
type lab struct {
	*suite
	t *testing.T
	// namespace is the first one.
	namespace string
}

func (s *suite) lab(t *testing.T) *lab {
	t.Helper()
	l := &lab{suite: s, t: t}
	l.namespace = l.newNamespace("", nil)
	return l
}

// newNamespace makes a namespace. Without a name it gets one.
func (l *lab) newNamespace(name string, labels map[string]string) string {
	l.t.Helper()
	if name == "" {
		name = "e2e-" + rand.String(6)
	}
	object := &core.Namespace{ObjectMeta: meta.ObjectMeta{Name: name, Labels: labels}}
	if _, err := l.Client.CoreV1().Namespaces().Create(l.t.Context(), object, meta.CreateOptions{}); err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() {
		if l.t.Failed() {
			l.describe()
		}
		l.deleteNamespace(name)
	})
	// Pods need it, and it comes a little later.
	l.eventually("service account", func(ctx context.Context) error {
		_, err := l.Client.CoreV1().ServiceAccounts(name).Get(ctx, "default", meta.GetOptions{})
		return err
	})
	return name
}

func (l *lab) deleteNamespace(name string) {
	l.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	err := l.Client.CoreV1().Namespaces().Delete(ctx, name, meta.DeleteOptions{})
	if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) {
		l.t.Error(err)
	}
}

// describe logs what podgate says of each node, and the last packets it dropped
// there.
func (l *lab) describe() {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for _, n := range l.Nodes {
		if n.Podgate == nil {
			continue
		}
		for _, args := range [][]string{{"status"}, {"flows", "--verdict", "denied"}} {
			out, err := n.PodgateCommand(ctx, args...)
			lines := strings.Split(string(out), "\n")
			lines = lines[max(0, len(lines)-80):]
			l.t.Logf("podgate %s on %s: %v\n%s", args[0], n.Name, err, strings.Join(lines, "\n"))
		}
	}
}

// eventually waits until check returns nil.
func (l *lab) eventually(what string, check func(context.Context) error) {
	l.t.Helper()
	if err := within(l.t.Context(), patience, check); err != nil {
		l.t.Fatalf("%s: %v", what, err)
	}
}

// within calls check until it returns nil, for as long as limit. The error is
// the last of check.
func within(ctx context.Context, limit time.Duration, check func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	var last error
	for {
		err := check(ctx)
		if err == nil {
			return nil
		}
		if last == nil || ctx.Err() == nil {
			last = err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("not within %s: %w", limit, last)
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// policy applies a NetworkPolicy of the lab's first namespace, unless it names
// another, and returns its name.
func (l *lab) policy(manifest string) string {
	l.t.Helper()
	var object networking.NetworkPolicy
	if err := yaml.UnmarshalStrict([]byte(manifest), &object); err != nil {
		l.t.Fatal(err)
	}
	if object.Namespace == "" {
		object.Namespace = l.namespace
	}
	client := l.Client.NetworkingV1().NetworkPolicies(object.Namespace)
	_, err := client.Create(l.t.Context(), &object, meta.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		_, err = client.Update(l.t.Context(), &object, meta.UpdateOptions{})
	}
	if err != nil {
		l.t.Fatal(err)
	}
	return object.Name
}

// deletePolicy deletes a policy of the first namespace.
func (l *lab) deletePolicy(name string) {
	l.t.Helper()
	if err := l.Client.NetworkingV1().NetworkPolicies(l.namespace).Delete(l.t.Context(), name, meta.DeleteOptions{}); err != nil {
		l.t.Fatal(err)
	}
}

// podSpec is what tests choose about a pod.
type podSpec struct {
	name      string
	namespace string // the lab's first one when empty
	node      string // the scheduler's choice when empty
	labels    map[string]string
	// change may change the object before it is created.
	change func(*core.Pod)
}

// pod is a pod that runs. It serves TCP and UDP from this process, in its own
// network namespace.
type pod struct {
	*core.Pod
	Addresses []netip.Addr
	net       ns.NetNS
	servers   []func()
}

// newPod starts a pod that does nothing, and servers in it.
func (l *lab) newPod(spec podSpec) *pod {
	l.t.Helper()
	object := l.createPod(spec)
	return l.running(object)
}

// newPods starts several pods at once.
func (l *lab) newPods(specs ...podSpec) []*pod {
	l.t.Helper()
	var objects []*core.Pod
	for _, spec := range specs {
		objects = append(objects, l.createPod(spec))
	}
	var pods []*pod
	for _, object := range objects {
		pods = append(pods, l.running(object))
	}
	return pods
}

// createPod creates a pod without waiting for it.
func (l *lab) createPod(spec podSpec) *core.Pod {
	l.t.Helper()
	if spec.namespace == "" {
		spec.namespace = l.namespace
	}
	labels := map[string]string{"pod": spec.name}
	maps.Copy(labels, spec.labels)
	object := &core.Pod{
		ObjectMeta: meta.ObjectMeta{Namespace: spec.namespace, Name: spec.name, Labels: labels},
		Spec: core.PodSpec{
			NodeName:                      spec.node,
			TerminationGracePeriodSeconds: new(int64),
			Containers: []core.Container{{
				Name: "main", Image: build.AgnhostImage, ImagePullPolicy: core.PullNever, Args: []string{"pause"},
			}},
		},
	}
	if spec.change != nil {
		spec.change(object)
	}
	created, err := l.Client.CoreV1().Pods(spec.namespace).Create(l.t.Context(), object, meta.CreateOptions{})
	if err != nil {
		l.t.Fatal(err)
	}
	return created
}

// running waits until a pod runs and starts servers in it.
func (l *lab) running(object *core.Pod) *pod {
	l.t.Helper()
	p := &pod{}
	l.eventually("pod "+object.Name, func(ctx context.Context) (err error) {
		p.Pod, err = l.Client.CoreV1().Pods(object.Namespace).Get(ctx, object.Name, meta.GetOptions{})
		if err != nil {
			return err
		}
		if p.Status.Phase != core.PodRunning || len(p.Status.PodIPs) == 0 {
			return fmt.Errorf("phase %s, addresses %v", p.Status.Phase, p.Status.PodIPs)
		}
		return nil
	})
	for _, ip := range p.Status.PodIPs {
		p.Addresses = append(p.Addresses, netip.MustParseAddr(ip.IP))
	}
	uid := string(p.UID)
	// The kubelet knows a pod that it made from a file by the hash of that.
	if hash, ok := p.Annotations[core.MirrorPodAnnotationKey]; ok {
		uid = hash
	}
	path, err := podNetNS(uid)
	if err != nil {
		l.t.Fatalf("pod %s: %v", p.Name, err)
	}
	if p.net, err = ns.GetNS(path); err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { p.net.Close() })
	if !p.Spec.HostNetwork {
		if err := p.serve(); err != nil {
			l.t.Fatalf("pod %s: %v", p.Name, err)
		}
		l.t.Cleanup(p.closeServers)
	}
	return p
}

// deletePod deletes a pod and waits until it is gone.
func (l *lab) deletePod(p *pod) {
	l.t.Helper()
	p.closeServers()
	client := l.Client.CoreV1().Pods(p.Namespace)
	if err := client.Delete(l.t.Context(), p.Name, meta.DeleteOptions{GracePeriodSeconds: new(int64)}); err != nil {
		l.t.Fatal(err)
	}
	l.eventually("deletion of "+p.Name, func(ctx context.Context) error {
		if _, err := client.Get(ctx, p.Name, meta.GetOptions{}); !apierrors.IsNotFound(err) {
			return fmt.Errorf("still there (%w)", err)
		}
		return nil
	})
}

// relabel replaces the value of a pod's label; an empty one removes it.
func (l *lab) relabel(p *pod, key, value string) {
	l.t.Helper()
	patch := fmt.Sprintf(`{"metadata":{"labels":{%q:%q}}}`, key, value)
	if value == "" {
		patch = fmt.Sprintf(`{"metadata":{"labels":{%q:null}}}`, key)
	}
	_, err := l.Client.CoreV1().Pods(p.Namespace).Patch(l.t.Context(), p.Name, mergePatch, []byte(patch), meta.PatchOptions{})
	if err != nil {
		l.t.Fatal(err)
	}
}

// address of the pod of a family, 4 or 6.
func (p *pod) address(family int) netip.Addr {
	for _, a := range p.Addresses {
		if a.Is4() == (family == 4) {
			return a
		}
	}
	return netip.Addr{}
}

// Do runs fn in the pod's network namespace, on this thread only.
func (p *pod) Do(fn func() error) error {
	return p.net.Do(func(ns.NetNS) error { return fn() })
}

// podNetNS finds the network namespace of a pod on this machine, by the cgroup
// that the kubelet makes for it.
func podNetNS(uid string) (string, error) {
	roots := []string{"/sys/fs/cgroup/pids", "/sys/fs/cgroup"}
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err == nil {
		roots = roots[1:]
	}
	clusters, err := filepath.Glob(filepath.Join(roots[0], fmt.Sprintf("podgate-e2e-%d", os.Getpid())))
	if err != nil {
		return "", err
	}
	var found string
	for _, root := range clusters {
		err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() || d.Name() != "cgroup.procs" || !strings.Contains(path, "/pod"+uid+"/") {
				return nil // some go while we walk
			}
			procs, err := os.ReadFile(path)
			if err != nil {
				return nil
			}
			if pid, _, ok := strings.Cut(string(procs), "\n"); ok {
				found = fmt.Sprintf("/proc/%s/ns/net", pid)
				return fs.SkipAll
			}
			return nil
		})
		if err != nil {
			return "", err
		}
	}
	if found == "" {
		return "", errors.New("no process of it")
	}
	return found, nil
}

// flushNeighbours has the pod forget every link address it knows.
func (p *pod) flushNeighbours() error {
	return p.Do(func() error {
		out, err := exec.Command("ip", "neigh", "flush", "all").CombinedOutput()
		if err != nil {
			return fmt.Errorf("ip neigh flush: %w\n%s", err, out)
		}
		return nil
	})
}
