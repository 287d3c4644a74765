// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package e2e

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	core "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/podgate/podgate/test/e2e/build"
)

// versions that differ from this one in what an upgrade has to carry over.
var versions = []build.Podgate{
	// Other constants make another program.
	{Tag: "program", Changes: map[string][2]string{
		"pinning/state.go": {"FLOW_ICMP:  {30, 30, 30, 30}", "FLOW_ICMP:  {31, 31, 31, 31}"},
	}},
	{Tag: "abi", Changes: map[string][2]string{"pinning/layout.go": {"const ABI = 1", "const ABI = 2"}}},
}

// testUpgrade goes to other versions and back while pods talk, and come and go:
// no packet is lost, nothing is opened, and no pod fails to start.
func testUpgrade(s *site) {
	for _, v := range versions {
		s.load(v)
	}
	l := s.newLab()
	manifest := s.manifest("podgate.yaml", firstVersion)
	s.apply(manifest)
	s.rolledOut("podgate")
	l.expect(l.verdicts()...)

	stop := l.hold()
	end := l.churnPods()
	for _, step := range []struct{ what, manifest, tree string }{
		{"another program", s.manifest("podgate.yaml", "program"), "v1"},
		{"another ABI", s.manifest("podgate.yaml", "abi"), "v2"},
		{"another configuration", strings.Replace(s.manifest("podgate.yaml", "abi"),
			"        - --watch\n", "        - --watch\n        - --options={\"waitForPolicy\":\"1s\"}\n", 1), "v2"},
		{"back to the first", manifest, "v1"},
	} {
		began := time.Now()
		s.apply(step.manifest)
		s.rolledOut("podgate")
		s.pinned(step.tree)
		s.t.Logf("%s took %s", step.what, time.Since(began).Round(100*time.Millisecond))
		l.expect(l.verdicts()...)
	}
	s.t.Logf("%d pods came and went meanwhile", end())
	stop()
	s.remove(manifest)
	s.unchanged()
	l.expect(l.ungated())
}

// pinned waits until every node has the state of one version and no other.
func (s *site) pinned(tree string) {
	s.t.Helper()
	err := within(s.t.Context(), patience, func(ctx context.Context) error {
		var errs []error
		for _, n := range s.Nodes {
			out, err := n.Exec(ctx, "/bin/ls", "/sys/fs/bpf/podgate")
			if got := strings.Fields(string(out)); err != nil || len(got) != 1 || got[0] != tree {
				errs = append(errs, fmt.Errorf("%s has %v, not %s: %w", n.Name, got, tree, errors.Join(err)))
			}
		}
		return errors.Join(errs...)
	})
	if err != nil {
		s.t.Error(err)
	}
}

// churnPods has pods come and go on every node until end is called, which
// reports those that could not be started and returns how many there were.
func (l *disruptionLab) churnPods() (end func() int) {
	ctx, cancel := context.WithCancel(l.t.Context())
	type result struct {
		pods   int
		failed []error
	}
	results := make(chan result)
	for _, n := range l.Nodes {
		go func() {
			var r result
			for ; ctx.Err() == nil; r.pods++ {
				if err := l.comeAndGo(fmt.Sprintf("churn-%s-%d", n.Name, r.pods), n.Name); err != nil {
					r.failed = append(r.failed, err)
				}
			}
			results <- r
		}()
	}
	return func() (pods int) {
		l.t.Helper()
		cancel()
		for range l.Nodes {
			r := <-results
			pods += r.pods
			for _, err := range r.failed {
				l.t.Error(err)
			}
		}
		events, err := l.Client.CoreV1().Events(l.namespace).List(l.t.Context(), meta.ListOptions{})
		if err != nil {
			l.t.Fatal(err)
		}
		for _, e := range events.Items {
			if strings.HasPrefix(e.Reason, "Failed") {
				l.t.Errorf("%s of %s: %s", e.Reason, e.InvolvedObject.Name, e.Message)
			}
		}
		return pods
	}
}

// comeAndGo starts a pod and deletes it.
func (l *disruptionLab) comeAndGo(name, node string) error {
	ctx := l.t.Context()
	pods := l.Client.CoreV1().Pods(l.namespace)
	_, err := pods.Create(ctx, &core.Pod{
		ObjectMeta: meta.ObjectMeta{Name: name, Labels: map[string]string{"pod": name}},
		Spec: core.PodSpec{
			NodeName: node, TerminationGracePeriodSeconds: new(int64),
			Containers: []core.Container{{Name: "main", Image: build.AgnhostImage, ImagePullPolicy: core.PullNever, Args: []string{"pause"}}},
		},
	}, meta.CreateOptions{})
	if err != nil {
		return err
	}
	err = within(ctx, patience, func(ctx context.Context) error {
		p, err := pods.Get(ctx, name, meta.GetOptions{})
		if err == nil && p.Status.Phase != core.PodRunning {
			err = fmt.Errorf("pod %s is %s", name, p.Status.Phase)
		}
		return err
	})
	if err != nil {
		return err
	}
	if err := pods.Delete(ctx, name, meta.DeleteOptions{GracePeriodSeconds: new(int64)}); err != nil {
		return err
	}
	return within(ctx, patience, func(ctx context.Context) error {
		if _, err := pods.Get(ctx, name, meta.GetOptions{}); !apierrors.IsNotFound(err) {
			return fmt.Errorf("pod %s is still there (%w)", name, errors.Join(err))
		}
		return nil
	})
}

// testReboot: a node comes back with its disk and nothing else, and its network
// is there before podgate is.
func testReboot(s *site) {
	l := s.newLab()
	manifest := s.manifest("podgate.yaml", firstVersion)
	s.apply(manifest)
	s.rolledOut("podgate")
	l.expect(l.verdicts()...)
	n := s.Nodes[1]
	s.must(n.Reboot(s.t.Context()))
	s.rolledOut("podgate")
	// The pods are the same, and made anew.
	for _, p := range []*pod{l.client, l.stranger} {
		before := p.Status.PodIP
		l.eventually("restart of "+p.Name, func(ctx context.Context) error {
			now, err := l.Client.CoreV1().Pods(p.Namespace).Get(ctx, p.Name, meta.GetOptions{})
			if err != nil {
				return err
			}
			if len(now.Status.ContainerStatuses) != 1 || now.Status.ContainerStatuses[0].RestartCount == 0 || !now.Status.ContainerStatuses[0].Ready {
				return fmt.Errorf("at %s before, now %+v", before, now.Status)
			}
			return nil
		})
	}
	l.client, l.stranger = l.running(l.client.Pod), l.running(l.stranger.Pod)
	l.expect(l.verdicts()...)
	s.remove(manifest)
	s.unchanged()
}
