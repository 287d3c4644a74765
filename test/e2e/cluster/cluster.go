// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package cluster

import (
	"bytes"
	"context"
	_ "embed" // manifests
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"text/template"
	"time"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/podgate/podgate/test/e2e/build"
)

// Options of a cluster.
type Options struct {
	// Bin is the directory of what package build made, Images the tarballs of
	// its images.
	Bin    string
	Images []string
	// Plugins is the directory of CNI plugins, podgate-cni among them, and of
	// podgate.
	Plugins string
	// Nodes is how many there are besides the control plane, which runs no pods;
	// 2 when 0.
	Nodes int
	// Proxy is the mode of kube-proxy: nftables or iptables; nftables when empty.
	Proxy string
	// Bare leaves podgate out.
	Bare bool
	// PolicyDir has podgate read policy from this directory instead of the API
	// server.
	PolicyDir string
	// Log gets progress.
	Log *slog.Logger
}

// Cluster is a running cluster.
type Cluster struct {
	Options
	// Dir is the scratch directory. Logs are in it.
	Dir string
	// Kubeconfig is the administrator's. The address in it is reachable from
	// the machines of the cluster only.
	Kubeconfig string
	// Client is the administrator's too, and works here.
	Client kubernetes.Interface
	// Config is how Client connects.
	Config *rest.Config

	ControlPlane *ControlPlane
	Nodes        []*Node

	pki    *pki
	cgroup string
}

// Start starts a cluster and waits until its nodes are ready and its DNS
// answers. The caller must close it. The error names the directory of logs.
func Start(ctx context.Context, o Options) (_ *Cluster, err error) {
	if o.Nodes == 0 {
		o.Nodes = 2
	}
	if o.Proxy == "" {
		o.Proxy = "nftables"
	}
	if o.Nodes > maxNodes {
		return nil, fmt.Errorf("cluster: %d nodes, at most %d", o.Nodes, maxNodes)
	}
	if os.Getuid() != 0 {
		return nil, errors.New("cluster: namespaces and containers need root")
	}
	for _, tool := range []string{"bash", "runc", "nft", "iptables", "ip6tables"} {
		if _, err := exec.LookPath(tool); err != nil {
			return nil, fmt.Errorf("cluster: %w", err)
		}
	}
	c := &Cluster{Options: o, cgroup: fmt.Sprintf("%s%d", cgroupPrefix, os.Getpid())}
	start := time.Now()
	sweepCgroups()
	if c.Dir, err = os.MkdirTemp("", "podgate-e2e-"); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("cluster: %w", err), c.stop())
		}
	}()
	for _, step := range []struct {
		what string
		do   func(context.Context) error
	}{
		{"machines", c.startMachines},
		{"control plane", c.startControlPlane},
		{"nodes", c.startNodes},
		{"DNS", c.startDNS},
	} {
		if err := step.do(ctx); err != nil {
			return nil, fmt.Errorf("%s (logs are in %s): %w", step.what, c.Dir, err)
		}
		o.Log.Info("up", "what", step.what, "after", time.Since(start).Round(100*time.Millisecond))
	}
	return c, nil
}

// startMachines makes the machines and the network between them.
func (c *Cluster) startMachines(context.Context) error {
	var err error
	if c.pki, err = newPKI(filepath.Join(c.Dir, "pki"), apiServerURL); err != nil {
		return err
	}
	machine, err := startMachine("cp", controlPlane, filepath.Join(c.Dir, "cp"), c.cgroup)
	if err != nil {
		return err
	}
	c.ControlPlane = &ControlPlane{Machine: machine}
	for i := 1; i <= c.Options.Nodes; i++ {
		n, err := c.newNode(i)
		if err != nil {
			return err
		}
		c.Nodes = append(c.Nodes, n)
	}
	return c.connect()
}

// connectClient makes Client, whose connections start in the control plane's
// network namespace.
func (c *Cluster) connectClient() error {
	c.Kubeconfig = filepath.Join(c.Dir, "admin.conf")
	if err := c.pki.kubeconfig(c.Kubeconfig, "admin", "system:masters"); err != nil {
		return err
	}
	config, err := clientcmd.BuildConfigFromFlags("", c.Kubeconfig)
	if err != nil {
		return err
	}
	config.QPS, config.Burst = 200, 400
	config.Dial = func(ctx context.Context, network, address string) (conn net.Conn, err error) {
		err = c.ControlPlane.Do(func() error {
			conn, err = (&net.Dialer{}).DialContext(ctx, network, address)
			return err
		})
		return conn, err
	}
	c.Config = config
	c.Client, err = kubernetes.NewForConfig(config)
	return err
}

// Kubectl runs kubectl with the administrator's rights and returns what it
// prints.
func (c *Cluster) Kubectl(ctx context.Context, args ...string) ([]byte, error) {
	args = append([]string{"--kubeconfig", c.Kubeconfig}, args...)
	return c.ControlPlane.Exec(ctx, filepath.Join(c.Bin, "kubectl"), args...)
}

// Apply applies manifests.
func (c *Cluster) Apply(ctx context.Context, manifests string) error {
	_, err := c.ControlPlane.ExecInput(ctx, bytes.NewReader([]byte(manifests)),
		filepath.Join(c.Bin, "kubectl"), "--kubeconfig", c.Kubeconfig, "apply", "-f", "-")
	return err
}

//go:embed manifests/dns.yaml
var dnsManifests string

// startDNS runs CoreDNS as the cluster's resolver.
func (c *Cluster) startDNS(ctx context.Context) error {
	t, err := template.New("dns").Parse(dnsManifests)
	if err != nil {
		return err
	}
	var b bytes.Buffer
	if err := t.Execute(&b, map[string]string{"Image": build.CoreDNSImage, "Address": dnsAddress}); err != nil {
		return err
	}
	if err := c.Apply(ctx, b.String()); err != nil {
		return err
	}
	_, err = c.Kubectl(ctx, "--namespace", "kube-system", "wait", "--for=condition=Available", "deployment/coredns", "--timeout=120s")
	return err
}

// Close ends the cluster and removes its scratch directory.
func (c *Cluster) Close() error {
	return errors.Join(c.stop(), os.RemoveAll(c.Dir))
}

// KeepLogs ends the cluster and leaves the logs of it.
func (c *Cluster) KeepLogs() error {
	errs := []error{c.stop()}
	for _, n := range c.Nodes {
		for _, dir := range []string{"containerd", "kubelet", "mnt"} {
			errs = append(errs, os.RemoveAll(filepath.Join(n.Dir, dir)))
		}
	}
	return errors.Join(append(errs, os.RemoveAll(filepath.Join(c.Dir, "cp", "etcd")))...)
}

// stop ends every machine.
func (c *Cluster) stop() error {
	var errs []error
	for _, n := range c.Nodes {
		errs = append(errs, n.Close())
	}
	if c.ControlPlane != nil {
		errs = append(errs, c.ControlPlane.Close())
	}
	return errors.Join(append(errs, removeCgroups(c.cgroup))...)
}

// waitFor calls check until it returns nil or ctx is done, and returns its last
// error then.
func waitFor(ctx context.Context, timeout time.Duration, check func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	for {
		err := check(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w after %s: %w", ctx.Err(), timeout, err)
		case <-time.After(200 * time.Millisecond):
		}
	}
}
