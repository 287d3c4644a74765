// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package bench

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	types100 "github.com/containernetworking/cni/pkg/types/100"

	"github.com/podgate/podgate/test/netlab"
)

// calls of each plugin and verb; one of them lasts milliseconds.
const calls = 60

// largest is what the plugin's binary may have, in bytes: 6 MB.
const largest = 6_000_000

// BenchmarkCNI measures whole processes of podgate-cni, from fork to exit, next
// to a plugin that does nothing: what the runtime waits for.
func BenchmarkCNI(b *testing.B) {
	plugins := build(b)
	for _, size := range []struct{ endpoints, policies int }{{1, 1}, {local, policies}} {
		title := fmt.Sprintf("endpoints=%d policies=%d", size.endpoints, size.policies)
		b.Run(title, func(b *testing.B) {
			n := newNode(b, size.policies, size.endpoints)
			for i := 1; i < size.endpoints; i++ {
				n.gate(b, n.newEndpoint(b, i), localPod(i))
			}
			all := n.calls(n.newEndpoint(b, 0), plugins)
			if err := n.Do(func() error { return measure(calls, all) }); err != nil {
				b.Fatal(err)
			}
			report(b, title, time.Millisecond, all)
		})
	}
}

// BenchmarkPluginSize reports the size of the plugin's binary.
func BenchmarkPluginSize(b *testing.B) {
	info, err := os.Stat(filepath.Join(build(b), "podgate-cni"))
	if err != nil {
		b.Fatal(err)
	}
	verdict := "PASS"
	if info.Size() > largest {
		verdict = "MISS"
	}
	fmt.Printf("\npodgate-cni has %.1f MB, target %.1f MB: %s\n\n", float64(info.Size())/1e6, float64(largest)/1e6, verdict)
	b.ReportMetric(float64(info.Size()), "bytes")
}

// build links podgate-cni and the no-op plugin as the Makefile does and installs
// them: the linker leaves a file in the page cache in small pieces, of which a
// process maps more than of a file that was copied.
func build(b *testing.B) string {
	b.Helper()
	linked, dir := b.TempDir(), b.TempDir()
	for name, pkg := range map[string]string{
		"podgate-cni": "github.com/podgate/podgate/plugin",
		"noop":        "github.com/podgate/podgate/test/bench/noop",
	} {
		cmd := exec.CommandContext(b.Context(), "go", "build", "-trimpath", "-buildvcs=false",
			"-ldflags", "-s -w", "-o", filepath.Join(linked, name), pkg)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			b.Fatalf("go build %s: %v\n%s", pkg, err, out)
		}
		binary, err := os.ReadFile(filepath.Join(linked, name))
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, name), binary, 0o755)
		}
		if err != nil {
			b.Fatal(err)
		}
	}
	return dir
}

// calls are ADD and DEL of each plugin. Every ADD finds a new veth, and every
// DEL one that was just gated, whatever runs before.
func (n *node) calls(e *endpoint, plugins string) []*series {
	call := func(verb, plugin string, keys netlab.Plugin) func() (time.Duration, error) {
		keys = n.Podgate().With(keys).With(netlab.Plugin{"cniVersion": "1.0.0", "name": "bench"})
		return func() (time.Duration, error) {
			if err := e.replug(); err != nil {
				return 0, err
			}
			config := keys.With(netlab.Plugin{"prevResult": e.result()})
			var took time.Duration
			for _, v := range []string{"ADD", "DEL"} {
				d, err := e.call(v, filepath.Join(plugins, plugin), config)
				if err != nil {
					return 0, err
				}
				if v == verb {
					took = d
				}
			}
			return took, nil
		}
	}
	add := &series{name: "no-op ADD", sample: call("ADD", "noop", nil)}
	del := &series{name: "no-op DEL", sample: call("DEL", "noop", nil)}
	all := []*series{add, del}
	for _, attach := range []string{"auto", "tcx"} {
		keys := netlab.Plugin{"attach": attach}
		toAdd := target{floor: add, more: 3 * time.Millisecond}
		toDel := target{floor: del, more: 2 * time.Millisecond}
		name := "podgate"
		if attach != "auto" {
			// What it costs is known and not the default.
			name, toAdd.more, toDel.more = "podgate "+attach, 0, 0
		}
		all = append(all,
			&series{name: name + " ADD", sample: call("ADD", "podgate-cni", keys), target: toAdd},
			&series{name: name + " DEL", sample: call("DEL", "podgate-cni", keys), target: toDel})
	}
	return all
}

// result is that of the main plugin before us in the chain.
func (e *endpoint) result() *types100.Result {
	r := &types100.Result{
		CNIVersion: "1.0.0",
		Interfaces: []*types100.Interface{
			{Name: e.host.Attrs().Name, Mac: e.host.Attrs().HardwareAddr.String()},
			{Name: e.IfName, Mac: e.mac.String(), Sandbox: e.NetNS()},
		},
	}
	for _, a := range e.addresses {
		ip := net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
		r.IPs = append(r.IPs, &types100.IPConfig{Interface: types100.Int(1), Address: ip})
	}
	return r
}

// call runs a plugin as a runtime does.
func (e *endpoint) call(verb, plugin string, config netlab.Plugin) (time.Duration, error) {
	stdin, err := json.Marshal(config)
	if err != nil {
		return 0, err
	}
	var stdout, stderr bytes.Buffer
	cmd := exec.Cmd{Path: plugin, Args: []string{plugin}, Stdin: bytes.NewReader(stdin), Stdout: &stdout, Stderr: &stderr}
	cmd.Env = []string{
		"CNI_COMMAND=" + verb, "CNI_CONTAINERID=" + e.ID, "CNI_NETNS=" + e.NetNS(),
		"CNI_IFNAME=" + e.IfName, "CNI_PATH=" + filepath.Dir(plugin),
		"CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=" + e.Namespace + ";K8S_POD_NAME=" + e.Name + ";K8S_POD_UID=" + e.UID,
	}
	start := time.Now()
	err = cmd.Run()
	d := time.Since(start)
	if err == nil && stderr.Len() > 0 {
		err = errors.New("it has something to say")
	}
	if err != nil {
		return 0, fmt.Errorf("%w\n%s%s", err, &stdout, &stderr)
	}
	return d, nil
}
