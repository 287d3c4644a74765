// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package e2e

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/podgate/podgate/test/e2e/build"
	"github.com/podgate/podgate/test/e2e/cluster"
)

func TestInstall(t *testing.T)         { runInstall(t, "nftables") }
func TestInstallIPTables(t *testing.T) { runInstall(t, "iptables") }

// runInstall puts podgate on a cluster that runs without it, with kube-proxy in
// a mode, and takes it off again, as people do.
func runInstall(t *testing.T, proxy string) {
	if os.Getenv(enabled) != "1" {
		t.Skipf("starts a Kubernetes cluster: `make test-e2e` runs it, with %s=1", enabled)
	}
	s := &site{suite: startBare(t, proxy), t: t}
	s.prepare()
	for _, test := range []struct {
		name string
		run  func(*site)
	}{
		{"Manifest", testManifest},
		{"Upgrade", testUpgrade},
		{"Reboot", testReboot},
		{"Helm", testHelm},
		{"Keep", testKeep},
	} {
		t.Run(test.name, func(t *testing.T) {
			test.run(s.on(t))
		})
	}
}

// site is a cluster onto which podgate is installed.
type site struct {
	*suite
	t *testing.T
	// root of the source tree.
	root string
	// files of each node before, by name of the node and path.
	files map[string]map[string]string
	// podgate is a binary that nodes can run, whatever is installed.
	podgate string
	// network is the configuration of each node's network before.
	network map[string]string
}

// on is the site of another test.
func (s *site) on(t *testing.T) *site {
	other := *s
	other.t = t
	return &other
}

const conflist = "/etc/cni/net.d/10-e2e.conflist"

// The version that is installed first.
const firstVersion = "first"

// prepare builds images, and remembers how the nodes are.
func (s *site) prepare() {
	s.t.Helper()
	here, err := os.Getwd()
	s.must(err)
	s.root = filepath.Join(here, "..", "..")
	file := s.load(build.Podgate{Tag: firstVersion})
	s.podgate = filepath.Join(filepath.Dir(file), "podgate")
	s.files, s.network = map[string]map[string]string{}, map[string]string{}
	for _, n := range s.Nodes {
		s.files[n.Name] = s.snapshot(n)
		out, err := n.Exec(s.t.Context(), "/bin/cat", conflist)
		s.must(err)
		s.network[n.Name] = string(out)
	}
}

func (s *site) must(err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatal(err)
	}
}

// load builds a version and imports its image on every node.
func (s *site) load(p build.Podgate) (file string) {
	s.t.Helper()
	file, err := p.Build(s.t.Context(), s.root, s.Dir)
	s.must(err)
	for _, n := range s.Nodes {
		_, err := n.Exec(s.t.Context(), filepath.Join(s.Bin, "ctr"), "--namespace", "k8s.io", "images", "import", file)
		s.must(err)
	}
	return file
}

// snapshot is what is in the directories of a node that podgate has to do with:
// digests or link targets by path.
func (s *site) snapshot(n *cluster.Node) map[string]string {
	s.t.Helper()
	const list = `find /etc/cni /opt/cni /var/lib/podgate /run/podgate -type f -exec md5sum {} + -o -type l -printf '%l  %p\n' 2>/dev/null
for pin in /sys/fs/bpf/*; do echo "pin  $pin"; done`
	out, err := n.Exec(s.t.Context(), "/bin/bash", "-c", list)
	s.must(err)
	files := map[string]string{}
	for line := range strings.Lines(string(out)) {
		sum, path, _ := strings.Cut(strings.TrimSpace(line), "  ")
		files[path] = sum
	}
	return files
}

// unchanged waits until every node is as it was before podgate.
func (s *site) unchanged() {
	s.t.Helper()
	err := within(s.t.Context(), patience, func(context.Context) error {
		var errs []error
		for _, n := range s.Nodes {
			got := s.snapshot(n)
			for path, sum := range got {
				if was, ok := s.files[n.Name][path]; !ok {
					errs = append(errs, fmt.Errorf("%s: %s is new", n.Name, path))
				} else if was != sum {
					errs = append(errs, fmt.Errorf("%s: %s has changed", n.Name, path))
				}
			}
			for path := range s.files[n.Name] {
				if _, ok := got[path]; !ok {
					errs = append(errs, fmt.Errorf("%s: %s is gone", n.Name, path))
				}
			}
			out, err := n.Exec(s.t.Context(), "/bin/bash", "-c",
				"for i in $(ls /sys/class/net); do tc filter show dev $i ingress; tc filter show dev $i egress; done 2>/dev/null | grep -c podgate_ || true")
			if err != nil || strings.TrimSpace(string(out)) != "0" {
				errs = append(errs, fmt.Errorf("%s: hooks of podgate: %s (%w)", n.Name, out, errors.Join(err)))
			}
		}
		return errors.Join(errs...)
	})
	if err != nil {
		s.t.Errorf("the nodes are not as they were: %v", err)
	}
}

// manifest is a file of install/kubernetes with a version's image in it.
func (s *site) manifest(name, version string) string {
	s.t.Helper()
	b, err := os.ReadFile(filepath.Join(s.root, "install", "kubernetes", name))
	s.must(err)
	image := regexp.MustCompile(`image: ghcr\.io/podgate/podgate:\S+`)
	if !image.Match(b) {
		s.t.Fatalf("%s has no %s", name, image)
	}
	return image.ReplaceAllLiteralString(string(b), "image: "+build.PodgateImage+":"+version)
}

func (s *site) apply(manifest string) {
	s.t.Helper()
	s.must(s.Apply(s.t.Context(), manifest))
}

// remove deletes what is in a manifest and waits until it is gone.
func (s *site) remove(manifest string) {
	s.t.Helper()
	_, err := s.ControlPlane.ExecInput(s.t.Context(), strings.NewReader(manifest),
		filepath.Join(s.Bin, "kubectl"), "--kubeconfig", s.Kubeconfig, "delete", "--timeout=120s", "-f", "-")
	s.must(err)
}

// rolledOut waits until every node has the DaemonSet's pods, ready.
func (s *site) rolledOut(daemonSet string) {
	s.t.Helper()
	_, err := s.Kubectl(s.t.Context(), "--namespace", "podgate", "rollout", "status", "daemonset/"+daemonSet, "--timeout=180s")
	if err != nil {
		s.describePods()
		s.t.Fatal(err)
	}
}

// describePods logs how podgate's pods are and what they said.
func (s *site) describePods() {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for _, args := range [][]string{
		{"get", "pods", "-o", "wide"}, {"get", "events"},
		{"logs", "--selector", "app.kubernetes.io/name=podgate", "--all-containers", "--prefix", "--tail=60"},
	} {
		out, err := s.Kubectl(ctx, append([]string{"--namespace", "podgate"}, args...)...)
		s.t.Logf("%v: %v\n%s", args, err, out)
	}
}

// newLab is a namespace whose failure also shows what podgate's pods said, and
// a server in it that a client may ask and a stranger may not.
func (s *site) newLab() *disruptionLab {
	s.t.Helper()
	l := &disruptionLab{lab: s.lab(s.t)}
	s.t.Cleanup(func() {
		if s.t.Failed() {
			s.describePods()
		}
	})
	pods := l.newPods(podSpec{name: "server", node: "n1"}, podSpec{name: "client", node: "n2"}, podSpec{name: "stranger", node: "n2"})
	l.server, l.client, l.stranger = pods[0], pods[1], pods[2]
	l.policy(`
metadata: { name: server }
spec:
  podSelector: { matchLabels: { pod: server } }
  ingress: [{ from: [{ podSelector: { matchLabels: { pod: client } } }] }]
`)
	return l
}

// ungated are the verdicts where there is no policy.
func (l *disruptionLab) ungated() []probe {
	return reaches(answered, l.server, 8080, l.client, l.stranger)
}

// connections of the client that must last.
func (l *disruptionLab) connections() (lasting func(when string)) {
	l.t.Helper()
	var open []*stream
	for _, a := range l.server.Addresses {
		open = append(open, l.open(l.client, "tcp", netip.AddrPortFrom(a, 8080)))
	}
	return func(when string) {
		l.t.Helper()
		for _, c := range open {
			if got := c.exchange(); got != answered {
				l.t.Errorf("%s a connection to %s is %s", when, c.RemoteAddr(), got)
			}
		}
	}
}

// testManifest: one file on, one file off. Pods that ran before are gated, and
// keep their connections all the time.
func testManifest(s *site) {
	l := s.newLab()
	l.expect(l.ungated())
	lasting := l.connections()
	manifest := s.manifest("podgate.yaml", firstVersion)
	s.apply(manifest)
	s.rolledOut("podgate")
	l.expect(l.verdicts()...)
	lasting("after the installation")
	late := l.newPod(podSpec{name: "late", node: "n1"})
	l.expect(reaches(dropped, l.server, 8080, late))

	// The network's owner writes its file anew.
	n := s.Nodes[0]
	_, err := n.ExecInput(s.t.Context(), strings.NewReader(s.network[n.Name]), "/bin/bash", "-c", "cat >/tmp/.new.$$ && mv /tmp/.new.$$ "+conflist)
	s.must(err)
	s.contains(n, "podgate-cni")

	s.remove(manifest)
	s.unchanged()
	l.expect(l.ungated(), reaches(answered, l.server, 8080, late))
	lasting("after the removal")
	for _, p := range []*pod{late, l.client} { // DEL of one made under podgate, and of an adopted one
		l.deletePod(p)
	}
	l.newPod(podSpec{name: "later", node: "n1"})
}

// helm runs the chart's tool where the API server is.
func (s *site) helm(args ...string) {
	s.t.Helper()
	helm := filepath.Join(s.Dir, "helm")
	if _, err := os.Stat(helm); errors.Is(err, fs.ErrNotExist) {
		cmd := exec.CommandContext(s.t.Context(), "go", "build", "-o", helm, "helm.sh/helm/v4/cmd/helm")
		cmd.Dir = filepath.Join(s.root, "install", "kubernetes")
		if out, err := cmd.CombinedOutput(); err != nil {
			s.t.Fatalf("build helm: %v\n%s", err, out)
		}
	}
	args = append(args, "--kubeconfig", s.Kubeconfig, "--namespace", "podgate")
	_, err := s.ControlPlane.Exec(s.t.Context(), helm, args...)
	s.must(err)
}

// contains waits until the configuration of a node's network has a text.
func (s *site) contains(n *cluster.Node, text string) {
	s.t.Helper()
	err := within(s.t.Context(), patience, func(ctx context.Context) error {
		out, err := n.Exec(ctx, "/bin/cat", conflist)
		if err == nil && !strings.Contains(string(out), text) {
			err = fmt.Errorf("%s has no %s in\n%s", n.Name, text, out)
		}
		return err
	})
	s.must(err)
}

func (s *site) chart() string { return filepath.Join(s.root, "install", "kubernetes", "podgate") }

// testHelm: the chart, with an option changed on the way. A node has no BPF file
// system, as those of kind have none.
func testHelm(s *site) {
	l := s.newLab()
	_, err := s.Nodes[1].Exec(s.t.Context(), "/bin/bash", "-c", "umount /sys/fs/bpf")
	s.must(err)
	image := []string{"--set", "image.repository=" + build.PodgateImage, "--set", "image.tag=" + firstVersion, "--set", "mountBPFFS=true"}
	s.helm(append([]string{"install", "podgate", s.chart(), "--create-namespace"}, image...)...)
	s.rolledOut("podgate")
	l.expect(l.verdicts()...)
	lasting := l.connections()
	s.helm(append([]string{"upgrade", "podgate", s.chart(), "--set-json", `cni.options={"waitForPolicy":"2s"}`}, image...)...)
	s.rolledOut("podgate")
	for _, n := range s.Nodes {
		s.contains(n, `"waitForPolicy"`)
	}
	l.expect(l.verdicts()...)
	lasting("after the upgrade")
	s.helm("uninstall", "podgate")
	s.unchanged()
	l.expect(l.ungated())
	lasting("after the removal")
	s.deleteNamespace("podgate")
}

func (s *site) deleteNamespace(name string) {
	s.t.Helper()
	l := &lab{suite: s.suite, t: s.t}
	l.deleteNamespace(name)
	l.eventually("deletion of "+name, func(ctx context.Context) error {
		_, err := s.Client.CoreV1().Namespaces().Get(ctx, name, meta.GetOptions{})
		if !apierrors.IsNotFound(err) {
			return fmt.Errorf("still there (%w)", errors.Join(err))
		}
		return nil
	})
}

// testKeep: without uninstallOnDelete all stays in force, for old pods and new
// ones, until the other manifest takes it off.
func testKeep(s *site) {
	l := s.newLab()
	manifest := strings.Replace(s.manifest("podgate.yaml", firstVersion), "        - --uninstall-with=$(NAMESPACE)/podgate\n", "", 1)
	s.apply(manifest)
	s.rolledOut("podgate")
	l.expect(l.verdicts()...)
	lasting := l.connections()
	s.remove(manifest)
	l.expect(l.verdicts()...)
	// Nobody knows the policy of a new pod.
	late := l.newPod(podSpec{name: "late", node: "n1"})
	l.expect(reaches(dropped, late, 8080, l.client), reaches(dropped, l.server, 8080, late))

	uninstall := s.manifest("podgate-uninstall.yaml", firstVersion)
	s.apply(uninstall)
	s.rolledOut("podgate-uninstall")
	s.unchanged()
	l.expect(l.ungated(), reaches(answered, late, 8080, l.client))
	lasting("after the removal")
	s.remove(uninstall)
	s.gone("/var/lib/podgate", "/run/podgate")
}

// gone checks that not even an empty directory is left.
func (s *site) gone(paths ...string) {
	s.t.Helper()
	for _, n := range s.Nodes {
		for _, path := range paths {
			if _, err := n.Exec(s.t.Context(), "/usr/bin/test", "!", "-e", path); err != nil {
				s.t.Errorf("%s: %s is left: %v", n.Name, path, err)
			}
		}
	}
}
