// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"

	"github.com/podgate/podgate/pinning"
	"github.com/podgate/podgate/test/netlab"
)

// plugins is the directory that TestMain fills.
var plugins string

func TestMain(m *testing.M) {
	os.Exit(func() int {
		if os.Getuid() != 0 {
			return m.Run()
		}
		dir, err := os.MkdirTemp("", "podgate-plugins-")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer func() {
			if err := os.RemoveAll(dir); err != nil {
				fmt.Fprintln(os.Stderr, err)
			}
		}()
		if err := netlab.Build(context.Background(), dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		plugins = dir
		return m.Run()
	}())
}

// lab is a node and what tests do with it.
type lab struct {
	*netlab.Node
	t *testing.T
}

func newLab(t *testing.T) *lab {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("network namespaces and BPF need root")
	}
	n, err := netlab.New(netlab.Options{Plugins: plugins, Stderr: t.Output()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	})
	return &lab{Node: n, t: t}
}

func chain(version string, plugins ...netlab.Plugin) netlab.Conflist {
	return netlab.Conflist{CNIVersion: version, Name: "lab", Plugins: plugins}
}

// pod makes a pod without a network.
func (l *lab) pod(spec netlab.PodSpec) *netlab.Pod {
	l.t.Helper()
	p, err := netlab.NewPod(spec)
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { p.Close() })
	return p
}

// add makes a pod in a network that is taken apart with the test.
func (l *lab) add(list netlab.Conflist, spec netlab.PodSpec) (*netlab.Pod, *types100.Result) {
	l.t.Helper()
	p, r, err := l.AddPod(l.t.Context(), list, spec)
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() {
		if err := l.DelPod(context.Background(), p); err != nil {
			l.t.Errorf("DEL of %s: %v", p.Name, err)
		}
	})
	return p, r
}

func (l *lab) options() pinning.Options {
	return pinning.Options{
		Layout: pinning.Layout{BPFFS: l.BPFFS, Name: "podgate"},
		Logger: slog.New(slog.NewTextHandler(l.t.Output(), nil)),
	}
}

// state opens what the plugin has pinned.
func (l *lab) state() *pinning.State {
	l.t.Helper()
	s, err := pinning.Open(l.t.Context(), l.options())
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { s.Close() })
	return s
}

// endpoints that are pinned, by container and interface; none when nothing is
// installed.
func (l *lab) endpoints() map[pinning.AttachmentKey]pinning.Endpoint {
	l.t.Helper()
	s, err := pinning.Open(l.t.Context(), l.options())
	if errors.Is(err, pinning.ErrNotInstalled) {
		return nil
	}
	if err != nil {
		l.t.Fatal(err)
	}
	defer s.Close()
	all := map[pinning.AttachmentKey]pinning.Endpoint{}
	for e, err := range s.Endpoints() {
		if err != nil {
			l.t.Fatal(err)
		}
		all[e.Key] = e
	}
	return all
}

func (l *lab) wantEndpoints(keys ...pinning.AttachmentKey) map[pinning.AttachmentKey]pinning.Endpoint {
	l.t.Helper()
	got := l.endpoints()
	if len(got) != len(keys) {
		l.t.Errorf("endpoints are %v, want %v", slices.Collect(maps.Keys(got)), keys)
	}
	for _, k := range keys {
		if _, ok := got[k]; !ok {
			l.t.Errorf("no endpoint %v", k)
		}
	}
	return got
}

func key(p *netlab.Pod) pinning.AttachmentKey {
	return pinning.AttachmentKey{ContainerID: p.ID, IfName: p.IfName}
}

// output of one call of a plugin.
type output struct {
	stdout []byte
	code   int
	err    types.Error
}

// call runs podgate-cni by itself, the way libcni does for one plugin of a
// chain, but with whatever a test wants to be wrong. A nil value of env unsets.
func (l *lab) call(verb string, env map[string]string, config netlab.Plugin) output {
	l.t.Helper()
	b, err := config.JSON()
	if err != nil {
		l.t.Fatal(err)
	}
	return l.callRaw("podgate-cni", verb, env, b)
}

func (l *lab) callRaw(plugin, verb string, env map[string]string, stdin []byte) output {
	l.t.Helper()
	var stdout bytes.Buffer
	cmd := exec.Command(filepath.Join(l.Plugins, plugin))
	cmd.Env = []string{"CNI_PATH=" + l.Plugins, "CNI_COMMAND=" + verb, "PATH=" + os.Getenv("PATH")}
	for k, v := range env {
		cmd.Env = append(cmd.Env, k+"="+v)
	}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(stdin), &stdout, l.t.Output()
	err := l.Do(cmd.Run)
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		l.t.Fatal(err)
	}
	o := output{stdout: stdout.Bytes(), code: cmd.ProcessState.ExitCode()}
	if o.code != 0 {
		var e struct {
			CNIVersion string `json:"cniVersion"`
			types.Error
		}
		if err := json.Unmarshal(o.stdout, &e); err != nil || e.CNIVersion == "" || e.Msg == "" {
			l.t.Errorf("exit %d without a CNI error on stdout: %s", o.code, o.stdout)
		}
		o.err = e.Error
	}
	return o
}

// silent is the answer of DEL, CHECK, GC and STATUS when all is well.
func (l *lab) silent(o output) {
	l.t.Helper()
	if o.code != 0 || len(o.stdout) > 0 {
		l.t.Errorf("exit %d, stdout %q; want 0 and nothing", o.code, o.stdout)
	}
}

// env is the environment of a call for a pod.
func env(p *netlab.Pod) map[string]string {
	return map[string]string{"CNI_CONTAINERID": p.ID, "CNI_NETNS": p.NetNS(), "CNI_IFNAME": p.IfName}
}

// listen accepts TCP connections in a pod and keeps them until the test ends.
func listen(t *testing.T, p *netlab.Pod, ip net.IP, port int) net.Addr {
	t.Helper()
	var l net.Listener
	err := p.Do(func() (err error) {
		l, err = net.ListenTCP("tcp", &net.TCPAddr{IP: ip, Port: port})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			defer c.Close()
		}
	}()
	return l.Addr()
}

// namespace is a node or a pod.
type namespace interface{ Do(func() error) error }

// reach opens a TCP connection.
func reach(from namespace, to net.Addr) error { return dial(from, to, 10*time.Second) }

// blocked tells whether a TCP connection does not come about. That shows only
// by waiting, for many times as long as one takes.
func blocked(from namespace, to net.Addr) bool { return dial(from, to, 300*time.Millisecond) != nil }

func dial(from namespace, to net.Addr, timeout time.Duration) error {
	return from.Do(func() error {
		c, err := net.DialTimeout("tcp", to.String(), timeout)
		if err != nil {
			return err
		}
		return c.Close()
	})
}
