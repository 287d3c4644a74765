// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podgate/podgate/test/netlab"
	"github.com/podgate/podgate/test/tracer"
)

// asPodgate makes the test binary be podgate, so that commands run as processes
// of their own in a node's network namespace.
const asPodgate = "PODGATE_TEST_AS_PODGATE"

func TestMain(m *testing.M) {
	tracer.Main()
	if os.Getenv(asPodgate) != "" {
		main()
	}
	os.Exit(m.Run())
}

// lab is a node with a policy directory and three pods to be.
type lab struct {
	t      *testing.T
	node   *netlab.Node
	list   netlab.Conflist
	dir    string
	runDir string
	pods   map[string]*netlab.Pod
	addrs  map[string][]string
}

func newLab(t *testing.T) *lab {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("network namespaces and bpffs need root")
	}
	plugins := t.TempDir()
	if err := netlab.Build(t.Context(), plugins); err != nil {
		t.Fatal(err)
	}
	node, err := netlab.New(netlab.Options{Plugins: plugins})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := node.Close(); err != nil {
			t.Error(err)
		}
	})
	l := &lab{
		t: t, node: node, dir: filepath.Join(node.Dir, "policies"), runDir: filepath.Join(node.Dir, "run"),
		list: netlab.Conflist{CNIVersion: "1.1.0", Name: "pods", Plugins: []netlab.Plugin{
			node.Bridge("br0", "10.71.0.0/24", "fd71::/64"), node.Podgate(),
		}},
		pods: make(map[string]*netlab.Pod), addrs: make(map[string][]string),
	}
	if err := os.Mkdir(l.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return l
}

// command is podgate in the node.
func (l *lab) command(ctx context.Context, args ...string) *exec.Cmd {
	l.t.Helper()
	self, err := os.Executable()
	if err != nil {
		l.t.Fatal(err)
	}
	cmd := exec.CommandContext(ctx, self, append([]string{"--bpffs", l.node.BPFFS, "--run-dir", l.runDir}, args...)...)
	cmd.Env = append(os.Environ(), asPodgate+"=1")
	return cmd
}

// run runs podgate in the node to its end.
func (l *lab) run(args ...string) (code int, stdout, stderr string) {
	l.t.Helper()
	ctx, cancel := context.WithTimeout(l.t.Context(), time.Minute)
	defer cancel()
	cmd := l.command(ctx, args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := l.node.Do(cmd.Run)
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		l.t.Fatalf("podgate %v: %v", args, err)
	}
	return cmd.ProcessState.ExitCode(), out.String(), errs.String()
}

// ok runs podgate and wants an exit code.
func (l *lab) ok(want int, args ...string) string {
	l.t.Helper()
	code, stdout, stderr := l.run(args...)
	if code != want {
		l.t.Fatalf("podgate %v: exit code %d, want %d\n%s%s", args, code, want, stdout, stderr)
	}
	return stdout
}

// json runs podgate for JSON.
func (l *lab) json(want int, into any, args ...string) {
	l.t.Helper()
	out := l.ok(want, append(args, "-o", "json")...)
	if err := json.Unmarshal([]byte(out), into); err != nil {
		l.t.Fatalf("podgate %v: %v\n%s", args, err, out)
	}
}

// daemon is a podgate that stays, as sync does.
type daemon struct {
	cmd *exec.Cmd
	mu  sync.Mutex
	log bytes.Buffer
}

func (d *daemon) Write(p []byte) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.log.Write(p)
}

func (d *daemon) logged() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.log.String()
}

// sync starts the daemon on the policy directory.
func (l *lab) sync(args ...string) *daemon {
	l.t.Helper()
	return l.start(append([]string{"--policy-dir", l.dir}, args...)...)
}

// start starts the daemon.
func (l *lab) start(args ...string) *daemon {
	l.t.Helper()
	return l.background(append([]string{"sync", "--node-name", "n1"}, args...)...)
}

// background starts a command that stays.
func (l *lab) background(args ...string) *daemon {
	l.t.Helper()
	d := &daemon{cmd: l.command(context.Background(), args...)}
	d.cmd.Stderr = d
	if err := l.node.Do(d.cmd.Start); err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() {
		d.end(l.t, unix.SIGKILL)
		if l.t.Failed() {
			l.t.Logf("daemon:\n%s", d.logged())
		}
	})
	return d
}

func (d *daemon) end(t *testing.T, how os.Signal) {
	t.Helper()
	if d.cmd.ProcessState != nil {
		return
	}
	if err := d.cmd.Process.Signal(how); err != nil {
		t.Error(err)
	}
	err := d.cmd.Wait()
	if how == unix.SIGTERM && err != nil {
		t.Errorf("daemon: %v", err)
	}
}

// write puts a manifest in place.
func (l *lab) write(name, text string) {
	l.t.Helper()
	path := filepath.Join(l.dir, name)
	if err := os.WriteFile(path+".tmp", []byte(text), 0o600); err != nil {
		l.t.Fatal(err)
	}
	if err := os.Rename(path+".tmp", path); err != nil {
		l.t.Fatal(err)
	}
}

// addPod adds the pod shop/NAME.
func (l *lab) addPod(name string) {
	l.t.Helper()
	l.add(name, netlab.PodSpec{Namespace: "shop", Name: name, UID: "uid-" + name})
}

func (l *lab) add(name string, spec netlab.PodSpec) {
	l.t.Helper()
	pod, result, err := l.node.AddPod(l.t.Context(), l.list, spec)
	if err != nil {
		l.t.Fatal(err)
	}
	l.pods[name] = pod
	for _, ip := range result.IPs {
		l.addrs[name] = append(l.addrs[name], ip.Address.IP.String())
	}
	l.t.Cleanup(func() {
		if err := l.node.DelPod(context.Background(), pod); err != nil {
			l.t.Error(err)
		}
	})
}

// listen serves TCP on port 80 of a pod, echoing.
func (l *lab) listen(pod string) {
	l.t.Helper()
	err := l.pods[pod].Do(func() error {
		listener, err := net.Listen("tcp", ":80")
		if err != nil {
			return err
		}
		l.t.Cleanup(func() { listener.Close() })
		go func() {
			for {
				c, err := listener.Accept()
				if err != nil {
					return
				}
				go func() {
					defer c.Close()
					_, _ = io.Copy(c, c)
				}()
			}
		}()
		return nil
	})
	if err != nil {
		l.t.Fatal(err)
	}
}

// reaches tells whether one pod gets an answer from another, over both
// families.
func (l *lab) reaches(from, to string) bool {
	l.t.Helper()
	n := l.answers(from, to)
	if n != 0 && n != len(l.addrs[to]) {
		l.t.Errorf("%s reaches %s over one family only", from, to)
	}
	return n > 0
}

// answers counts the addresses of a pod that another gets an answer from.
func (l *lab) answers(from, to string) (n int) {
	l.t.Helper()
	for _, addr := range l.addrs[to] {
		err := l.pods[from].Do(func() error {
			c, err := net.DialTimeout("tcp", net.JoinHostPort(addr, "80"), 300*time.Millisecond)
			if err != nil {
				return err
			}
			return c.Close()
		})
		if err == nil {
			n++
		}
	}
	return n
}

// until waits for a condition.
func (l *lab) until(what string, ok func() bool) {
	l.t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			_, out, errs := l.run("status")
			l.t.Fatalf("not %s\n%s%s", what, out, errs)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func (l *lab) status() statusReport {
	l.t.Helper()
	code, out, errs := l.run("status", "-o", "json")
	var r statusReport
	if code == 1 && strings.Contains(errs, "not set up") {
		return r
	}
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		l.t.Fatalf("status: %v\n%s%s", err, out, errs)
	}
	if (code == 2) != (len(r.Problems) > 0) {
		l.t.Errorf("status: exit code %d with problems %v", code, r.Problems)
	}
	return r
}

// states of the endpoints by name.
func states(r statusReport) map[string]string {
	out := make(map[string]string)
	for _, e := range r.Endpoints {
		out[e.Name] = e.State
	}
	return out
}

func hasProblem(r statusReport, text string) bool {
	for _, p := range r.Problems {
		if strings.Contains(p.Subject+": "+p.Reason, text) {
			return true
		}
	}
	return false
}
