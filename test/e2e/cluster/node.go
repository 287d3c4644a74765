// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"text/template"
	"time"

	core "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/podgate/podgate/test/e2e/build"
)

// Node is a machine that runs pods.
type Node struct {
	*Machine
	// Addresses of the node, IPv4 and IPv6.
	Addresses []string

	Containerd, Kubelet, Proxy *Process
	// Podgate is "podgate sync"; nil in a bare cluster.
	Podgate *Process

	index   int
	cluster *Cluster
}

// newNode writes the configuration of node i and starts its PID 1, which puts
// it in place.
func (c *Cluster) newNode(i int) (*Node, error) {
	name := fmt.Sprintf("n%d", i)
	n := &Node{index: i, cluster: c, Addresses: addresses(i)}
	dir := filepath.Join(c.Dir, name)
	if err := c.configure(name, i, filepath.Join(dir, "files")); err != nil {
		return nil, fmt.Errorf("configuration of %s: %w", name, err)
	}
	var err error
	n.Machine, err = startMachine(name, node, dir, filepath.Join(c.cgroup, name))
	return n, err
}

// configurations of a node's programs by path.
//
// The machine may lack CAP_SYS_RESOURCE: nothing lowers an OOM score or raises
// a limit.
var configurations = map[string]*template.Template{
	"etc/containerd/config.toml": template.Must(template.New("containerd").Parse(`version = 3
root = "/var/lib/containerd"
state = "/run/containerd"
disabled_plugins = ["io.containerd.grpc.v1.cri.nri", "io.containerd.nri.v1.nri"]
[plugins.'io.containerd.cri.v1.images']
  snapshotter = "overlayfs"
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = "{{.Pause}}"
[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
  BinaryName = "{{.Runc}}"
  SystemdCgroup = false
[plugins.'io.containerd.cri.v1.runtime'.cni]
  bin_dirs = ["/opt/cni/bin"]
  conf_dir = "/etc/cni/net.d"
`)),
	"etc/kubernetes/kubelet.yaml": template.Must(template.New("kubelet").Parse(`apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
failCgroupV1: false
cgroupDriver: cgroupfs
cgroupRoot: /{{.Cgroup}}
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
staticPodPath: /etc/kubernetes/manifests
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: {{.CA}}}}
authorization: {mode: Webhook}
clusterDNS: ["{{.DNS}}"]
clusterDomain: cluster.local
resolvConf: ""
failSwapOn: false
oomScoreAdj: 0
makeIPTablesUtilChains: false
nodeStatusUpdateFrequency: 4s
imageGCHighThresholdPercent: 100
evictionHard: {memory.available: 50Mi, nodefs.available: "1%", imagefs.available: "1%"}
shutdownGracePeriod: 0s
volumePluginDir: /var/lib/kubelet/volumeplugins
`)),
	"etc/kubernetes/proxy.yaml": template.Must(template.New("proxy").Parse(`apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: {{.Proxy}}
oomScoreAdj: 0
clusterCIDR: {{.PodRanges}}
clientConnection: {kubeconfig: /etc/kubernetes/proxy.conf}
hostnameOverride: {{.Name}}
conntrack: {maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}
`)),
}

// configure writes the files of a node below dir.
func (c *Cluster) configure(name string, i int, dir string) error {
	runc, err := exec.LookPath("runc")
	if err != nil {
		return err
	}
	values := map[string]string{
		"Name": name, "Pause": build.PauseImage, "Runc": runc, "Cgroup": filepath.Join(c.cgroup, name),
		"CA": c.pki.path("ca.crt"), "DNS": dnsAddress, "Proxy": c.Proxy, "PodRanges": podRanges,
	}
	for file, t := range configurations {
		var b strings.Builder
		if err := t.Execute(&b, values); err != nil {
			return err
		}
		if err := writeFile(filepath.Join(dir, file), b.String()); err != nil {
			return err
		}
	}
	conflist, err := json.MarshalIndent(c.conflist(i), "", "  ")
	if err != nil {
		return err
	}
	if err := writeFile(filepath.Join(dir, "etc/cni/net.d/10-e2e.conflist"), string(conflist)); err != nil {
		return err
	}
	for file, subject := range map[string][2]string{
		"kubelet.conf": {"system:node:" + name, "system:nodes"},
		"proxy.conf":   {"system:kube-proxy", ""},
		"podgate.conf": {"podgate", ""},
	} {
		if err := c.pki.kubeconfig(filepath.Join(dir, "etc/kubernetes", file), subject[0], subject[1]); err != nil {
			return err
		}
	}
	bin := filepath.Join(dir, "opt/cni/bin")
	if err := os.MkdirAll(filepath.Join(dir, "etc/kubernetes/manifests"), 0o755); err != nil {
		return err
	}
	return linkAll(c.Plugins, bin)
}

// conflist is the pod network of node i.
func (c *Cluster) conflist(i int) map[string]any {
	var ranges [][]map[string]string
	for _, subnet := range podRangesOf(i) {
		ranges = append(ranges, []map[string]string{{"subnet": subnet}})
	}
	plugins := []map[string]any{{
		"type": "bridge", "bridge": "cni0", "isGateway": true, "hairpinMode": true,
		"ipam": map[string]any{
			"type": "host-local", "ranges": ranges,
			"routes": []map[string]string{{"dst": "0.0.0.0/0"}, {"dst": "::/0"}},
		},
	}}
	if !c.Bare {
		plugins = append(plugins, map[string]any{"type": "podgate-cni"})
	}
	plugins = append(plugins, map[string]any{
		"type": "portmap", "capabilities": map[string]bool{"portMappings": true},
	})
	return map[string]any{"cniVersion": "1.1.0", "name": "e2e", "plugins": plugins}
}

// linkAll makes symbolic links in to, for PID 1 to copy, to the files in from.
func linkAll(from, to string) error {
	if err := os.MkdirAll(to, 0o755); err != nil {
		return err
	}
	entries, err := os.ReadDir(from)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := os.Symlink(filepath.Join(from, e.Name()), filepath.Join(to, e.Name())); err != nil {
			return err
		}
	}
	return nil
}

func writeFile(path, content string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, []byte(content), 0o644)
}

// startNodes starts what runs on nodes and waits until they are ready.
func (c *Cluster) startNodes(ctx context.Context) error {
	if !c.Bare {
		if err := c.Apply(ctx, podgateRBAC); err != nil {
			return err
		}
	}
	errs := make(chan error)
	for _, n := range c.Nodes {
		go func() { errs <- n.start(ctx) }()
	}
	var all []error
	for range c.Nodes {
		all = append(all, <-errs)
	}
	return errors.Join(all...)
}

// start starts the programs of a node in the order in which they need each
// other.
func (n *Node) start(ctx context.Context) error {
	c := n.cluster
	var err error
	n.Containerd, err = n.Start("containerd", Command{
		Path: filepath.Join(c.Bin, "containerd"),
		Env:  []string{"PATH=" + c.Bin + ":" + os.Getenv("PATH")}, // of its shim
	})
	if err != nil {
		return err
	}
	if err := n.WaitContainerd(ctx); err != nil {
		return err
	}
	for _, image := range c.Images {
		if _, err := n.Exec(ctx, filepath.Join(c.Bin, "ctr"), "--namespace", "k8s.io", "images", "import", image); err != nil {
			return err
		}
	}
	// Before the kubelet, so that the node has the pod ranges of its network
	// configuration.
	ranges := podRangesOf(n.index)
	_, err = c.Client.CoreV1().Nodes().Create(ctx, &core.Node{
		ObjectMeta: meta.ObjectMeta{Name: n.Name, Labels: map[string]string{"kubernetes.io/hostname": n.Name}},
		Spec:       core.NodeSpec{PodCIDR: ranges[0], PodCIDRs: ranges},
	}, meta.CreateOptions{})
	if err != nil {
		return err
	}
	if err := n.startPodgate(); err != nil {
		return err
	}
	n.Proxy, err = n.Start("proxy", Command{
		Path: filepath.Join(c.Bin, "kube-proxy"),
		Args: []string{"--config=/etc/kubernetes/proxy.yaml"},
	})
	if err != nil {
		return err
	}
	n.Kubelet, err = n.Start("kubelet", Command{
		Path: filepath.Join(c.Bin, "kubelet"),
		Args: []string{
			"--config=/etc/kubernetes/kubelet.yaml",
			"--kubeconfig=/etc/kubernetes/kubelet.conf",
			"--hostname-override=" + n.Name,
			"--node-ip=" + strings.Join(n.Addresses, ","),
			"--root-dir=/var/lib/kubelet",
			"--cert-dir=/var/lib/kubelet/pki",
		},
	})
	if err != nil {
		return err
	}
	return n.WaitReady(ctx)
}

// WaitContainerd waits until containerd answers.
func (n *Node) WaitContainerd(ctx context.Context) error {
	return waitFor(ctx, time.Minute, func(ctx context.Context) error {
		_, err := n.Exec(ctx, filepath.Join(n.cluster.Bin, "ctr"), "version")
		return err
	})
}

// WaitReady waits until the API server has it that the node is ready.
func (n *Node) WaitReady(ctx context.Context) error {
	return waitFor(ctx, 3*time.Minute, func(ctx context.Context) error {
		object, err := n.cluster.Client.CoreV1().Nodes().Get(ctx, n.Name, meta.GetOptions{})
		if err != nil {
			return err
		}
		for _, condition := range object.Status.Conditions {
			if condition.Type == core.NodeReady && condition.Status == core.ConditionTrue {
				return nil
			}
		}
		return fmt.Errorf("node %s is not ready: %+v", n.Name, object.Status.Conditions)
	})
}
