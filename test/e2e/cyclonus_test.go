// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/mattfenwick/cyclonus/pkg/connectivity"
	cyclonusprobe "github.com/mattfenwick/cyclonus/pkg/connectivity/probe"
	"github.com/mattfenwick/cyclonus/pkg/generator"
	"github.com/mattfenwick/cyclonus/pkg/kube"
	"github.com/mattfenwick/cyclonus/pkg/worker"
	"github.com/sirupsen/logrus"
	core "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"sigs.k8s.io/yaml"

	"github.com/podgate/podgate/test/e2e/build"
)

// cyclonusModes are how cyclonus addresses a pod: by the name of a Service of
// its own, which takes the resolver, kube-proxy and policy, or by an address of
// it. The Services are of IPv4.
var cyclonusModes = []struct {
	name  string
	probe generator.ProbeMode
	ipv6  bool
}{
	{"ServiceName", generator.ProbeModeServiceName, false},
	{"IPv4", generator.ProbeModePodIP, false},
	{"IPv6", generator.ProbeModePodIP, true},
}

var cyclonusNamespaces = []string{"x", "y", "z"}

// testCyclonus has cyclonus generate policies, probe every pair of nine pods
// under each, and compare with what its simulator expects: all its cases, those
// too that it leaves out by default.
//
// A pod to itself is not compared: it reaches itself, and the simulator does not
// know.
func testCyclonus(t *testing.T, s *suite) {
	log, err := os.Create(filepath.Join(s.reports, "cyclonus.log"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { log.Close() })
	logrus.SetOutput(log)
	client, err := kubernetes.NewForConfig(s.Config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, name := range append(cyclonusNamespaces, "w", "y-2") { // some cases have these, too
			deleteNamespace(t, client, name)
		}
	})
	for _, mode := range cyclonusModes {
		k := &cyclonusCluster{&kube.Kubernetes{ClientSet: client, RestConfig: s.Config}, s.resolver(t), mode.ipv6}
		t.Run(mode.name, func(t *testing.T) { k.run(t, mode.probe) })
	}
}

// run runs all cases.
func (k *cyclonusCluster) run(t *testing.T, mode generator.ProbeMode) {
	resources, err := cyclonusprobe.NewDefaultResources(k, cyclonusNamespaces, []string{"a", "b", "c"}, []int{80, 81},
		[]core.Protocol{core.ProtocolTCP, core.ProtocolUDP}, // the kernel may have no SCTP sockets
		nil, int(patience.Seconds()), false, build.Registry)
	if err != nil {
		t.Fatal(err)
	}
	interpreter := connectivity.NewInterpreter(k, resources, &connectivity.InterpreterConfig{
		ResetClusterBeforeTestCase: true, VerifyClusterStateBeforeTestCase: true,
		PerturbationWaitSeconds: 1, KubeProbeRetries: 5,
		BatchJobs: true, IgnoreLoopback: true,
	})
	blocks, err := resources.GetPod("z", "c") // what ipBlocks are around
	if err != nil {
		t.Fatal(err)
	}
	all := generator.NewTestCaseGenerator(true, blocks.IP, cyclonusNamespaces, nil, nil).GenerateAllTestCases()
	steps, attempts := 0, 0
	for i, c := range all {
		for _, step := range c.Steps {
			step.Probe = &generator.ProbeConfig{AllAvailable: step.Probe.AllAvailable, PortProtocol: step.Probe.PortProtocol, Mode: mode}
		}
		t.Run(fmt.Sprintf("%03d %s", i, c.Description), func(t *testing.T) {
			result := interpreter.ExecuteTestCase(c)
			if result.Err != nil {
				t.Fatal(result.Err)
			}
			steps += len(result.Steps)
			for i, step := range result.Steps {
				for _, counts := range step.LastComparison().ResultsByProtocol() {
					for _, n := range counts {
						attempts += n
					}
				}
				if !step.Passed(interpreter.Config.IgnoreLoopback) {
					t.Errorf("step %d: %s", i+1, describeStep(t, step))
				}
			}
		})
	}
	t.Logf("%d cases, %d steps, %d attempts to connect", len(all), steps, attempts)
}

// describeStep tells what cyclonus expected of a step and what it saw.
func describeStep(t *testing.T, step *connectivity.StepResult) string {
	t.Helper()
	policies, err := yaml.Marshal(step.KubePolicies)
	if err != nil {
		t.Error(err)
	}
	return fmt.Sprintf("wrong at X:\n%s\nexpected:\n%s\nseen:\n%s\npolicies:\n%s", step.LastComparison().RenderSuccessTable(),
		step.SimulatedProbe.RenderTable(), step.LastKubeProbe().RenderTable(), policies)
}

// cyclonusCluster is the cluster as cyclonus sees it. It asks for many small
// programs to be run in the containers of a pod, each of which connects once.
// All of that is done by this process in the pod's network namespace, a hundred
// times as fast.
type cyclonusCluster struct {
	*kube.Kubernetes
	resolver netip.AddrPort
	// ipv6 makes that address the one of each pod.
	ipv6 bool
}

// GetPod is a pod with the address that counts.
func (k *cyclonusCluster) GetPod(namespace, name string) (*core.Pod, error) {
	p, err := k.Kubernetes.GetPod(namespace, name)
	if err == nil {
		k.chooseAddress(p)
	}
	return p, err
}

// GetPodsInNamespace is all pods with the address that counts.
func (k *cyclonusCluster) GetPodsInNamespace(namespace string) ([]core.Pod, error) {
	pods, err := k.Kubernetes.GetPodsInNamespace(namespace)
	for i := range pods {
		k.chooseAddress(&pods[i])
	}
	return pods, err
}

func (k *cyclonusCluster) chooseAddress(p *core.Pod) {
	for _, ip := range p.Status.PodIPs {
		if a, err := netip.ParseAddr(ip.IP); err == nil && a.Is6() == k.ipv6 {
			p.Status.PodIP = ip.IP
		}
	}
}

// ExecuteRemoteCommand is the worker of cyclonus: a batch of requests in, their
// results out.
func (k *cyclonusCluster) ExecuteRemoteCommand(namespace, name, _ string, command []string) (stdout, stderr string, commandErr, err error) {
	if len(command) != 3 || command[0] != "/worker" || command[1] != "--jobs" {
		return "", "", nil, fmt.Errorf("unknown command %q", command)
	}
	var batch worker.Batch
	if err := json.Unmarshal([]byte(command[2]), &batch); err != nil {
		return "", "", nil, err
	}
	object, err := k.GetPod(namespace, name)
	if err != nil {
		return "", "", nil, err
	}
	path, err := podNetNS(string(object.UID))
	if err != nil {
		return "", "", nil, fmt.Errorf("pod %s/%s: %w", namespace, name, err)
	}
	p := &pod{Pod: object}
	if p.net, err = ns.GetNS(path); err != nil {
		return "", "", nil, err
	}
	defer p.net.Close()
	results := make([]worker.Result, len(batch.Requests))
	var wg sync.WaitGroup
	for i, r := range batch.Requests {
		results[i].Request = r
		wg.Go(func() {
			if err := k.request(p, r); err != nil {
				results[i].Error = err.Error()
			}
		})
	}
	wg.Wait()
	out, err := json.Marshal(results)
	return string(out), "", nil, err
}

// request resolves a name if it is one, and connects as `agnhost connect` does.
func (k *cyclonusCluster) request(p *pod, r *worker.Request) error {
	host, err := netip.ParseAddr(r.Host)
	if err != nil {
		got, err := punctually(func() error {
			addresses, err := p.lookup(k.resolver, "ip4", r.Host)
			if err == nil {
				host = addresses[0]
			}
			return err
		})
		if err != nil {
			return err
		}
		if got != answered {
			return fmt.Errorf("resolver: %s", got)
		}
	}
	to := netip.AddrPortFrom(host, uint16(r.Port))
	got, err := punctually(func() error { return p.greet(strings.ToLower(string(r.Protocol)), to) })
	if err == nil && got != answered {
		err = fmt.Errorf("%s: %s", to, got)
	}
	return err
}

// greet connects and, over UDP, waits for an answer.
func (p *pod) greet(network string, to netip.AddrPort) error {
	c, err := p.dial(network, to)
	if err != nil {
		return err
	}
	defer c.Close()
	if network == "tcp" {
		return nil
	}
	if err := c.SetDeadline(time.Now().Add(dialTimeout)); err != nil {
		return err
	}
	if _, err := io.WriteString(c, "hello\n"); err != nil {
		return err
	}
	_, err = c.Read(make([]byte, 1024))
	return err
}

// deleteNamespace waits until it is gone, so that another test may have it.
func deleteNamespace(t *testing.T, client kubernetes.Interface, name string) {
	t.Helper()
	err := within(context.Background(), patience, func(ctx context.Context) error {
		err := client.CoreV1().Namespaces().Delete(ctx, name, meta.DeleteOptions{})
		if apierrors.IsNotFound(err) {
			return nil
		}
		return errors.Join(errors.New("still there"), err)
	})
	if err != nil {
		t.Errorf("namespace %s: %v", name, err)
	}
}
