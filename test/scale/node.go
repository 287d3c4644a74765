// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/clientcmd/api"

	"github.com/podgate/podgate/pinning"
	"github.com/podgate/podgate/test/netlab"
)

// node is node 0: pods in network namespaces, and a daemon.
type node struct {
	*netlab.Node
	dir    string
	list   netlab.Conflist
	server *apiServer
	state  *pinning.State
	daemon *exec.Cmd
	log    bytes.Buffer
	pods   []*netlab.Pod
	// gates by pod.
	gates map[*pod]gate
}

type gate struct {
	number  uint32
	address netip.Addr
}

// daemonAddress is where the daemon tells of itself, on its node.
const daemonAddress = "127.0.0.1:9090"

// newNode makes a node and an API server that it reaches.
func newNode(plugins string) (_ *node, err error) {
	n := &node{gates: make(map[*pod]gate)}
	if n.Node, err = netlab.New(netlab.Options{Plugins: plugins}); err != nil {
		return nil, err
	}
	// The daemon's files are in memory, as /run is.
	if n.dir, err = os.MkdirTemp("/dev/shm", "podgate-scale-"); err != nil {
		return nil, errors.Join(err, n.Node.Close())
	}
	n.list = netlab.Conflist{CNIVersion: "1.1.0", Name: "pods", Plugins: []netlab.Plugin{
		n.Bridge("br0", "10.0.0.0/24"), n.Podgate(),
	}}
	var l net.Listener
	if err = n.Do(func() (err error) {
		l, err = net.Listen("tcp", "127.0.0.1:0")
		return err
	}); err == nil {
		n.server, err = newServer(l)
	}
	if err != nil {
		return nil, errors.Join(err, n.Close())
	}
	return n, nil
}

// Close takes everything away.
func (n *node) Close() error {
	var errs []error
	if n.daemon != nil && n.daemon.Process != nil {
		_ = n.daemon.Process.Signal(unix.SIGTERM) // it may have ended
		_ = n.daemon.Wait()
	}
	if n.server != nil {
		n.server.http.CloseClientConnections()
		n.server.http.Close()
	}
	if n.state != nil {
		errs = append(errs, n.state.Close())
	}
	for _, p := range n.pods {
		errs = append(errs, n.DelPod(context.Background(), p))
	}
	return errors.Join(append(errs, n.Node.Close(), os.RemoveAll(n.dir))...)
}

// start starts the daemon.
func (n *node) start(ctx context.Context, podgate string) error {
	config := api.NewConfig()
	config.Clusters["c"] = &api.Cluster{Server: n.server.http.URL, CertificateAuthorityData: n.server.certificate()}
	config.AuthInfos["u"] = &api.AuthInfo{Token: "token"}
	config.Contexts["c"] = &api.Context{Cluster: "c", AuthInfo: "u"}
	config.CurrentContext = "c"
	path := filepath.Join(n.dir, "kubeconfig")
	if err := clientcmd.WriteToFile(*config, path); err != nil {
		return err
	}
	n.daemon = exec.CommandContext(ctx, podgate, "sync", "--kubeconfig", path, "--node-name", nodeName(0), "--log-level", "warn",
		"--bpffs", n.BPFFS, "--run-dir", filepath.Join(n.dir, "run"), "--metrics", daemonAddress, "--pprof")
	n.daemon.Stdout, n.daemon.Stderr = &n.log, &n.log
	return n.Do(n.daemon.Start)
}

// ready waits until the kernel has all the daemon knows.
func (n *node) ready(ctx context.Context) error {
	for {
		var conn net.Conn
		err := n.Do(func() (err error) {
			conn, err = net.DialTimeout("tcp", daemonAddress, time.Second)
			return err
		})
		if err == nil {
			_, err = conn.Write([]byte("GET /readyz HTTP/1.0\r\n\r\n"))
			b := make([]byte, 64)
			k, _ := conn.Read(b)
			if err = errors.Join(err, conn.Close()); err == nil && strings.Contains(string(b[:k]), " 200 ") {
				return nil
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the daemon is not ready: %w\n%s", ctx.Err(), n.log.Bytes())
		case <-time.After(2 * time.Millisecond):
		}
	}
}

// attach adds the pods of node 0 to the network, and tells the API server their
// addresses.
func (n *node) attach(ctx context.Context, w *world) error {
	for _, p := range w.local() {
		attached, result, err := n.AddPod(ctx, n.list, netlab.PodSpec{Namespace: p.app.namespace.name, Name: p.name(), UID: p.uid()})
		if err != nil {
			return err
		}
		n.pods = append(n.pods, attached)
		address, ok := netip.AddrFromSlice(result.IPs[0].Address.IP)
		if !ok {
			return fmt.Errorf("%s has the address %s", p.name(), result.IPs[0])
		}
		p.address, p.ready = address.Unmap(), true
		if err := w.server.put(podsPath, podOf(p)); err != nil {
			return err
		}
		n.gates[p] = gate{address: p.address}
	}
	var err error
	if n.state, err = pinning.Open(ctx, pinning.Options{Layout: pinning.Layout{BPFFS: n.BPFFS, Name: "podgate"}}); err != nil {
		return err
	}
	for ep, err := range n.state.Endpoints() {
		if err != nil {
			return err
		}
		for p, g := range n.gates {
			if ep.Pod != "" && string(ep.Pod) == p.uid() {
				g.number = ep.Gate
				n.gates[p] = g
			}
		}
	}
	return nil
}

// usage is what a process uses.
type usage struct {
	RSS, PSS, Peak int64         // bytes
	CPU            time.Duration // in all
	// Waited is how long its threads were ready to run and had no processor.
	Waited time.Duration
}

func usageOf(pid int) (u usage, err error) {
	for file, keys := range map[string]map[string]*int64{
		"smaps_rollup": {"Rss:": &u.RSS, "Pss:": &u.PSS},
		"status":       {"VmHWM:": &u.Peak},
	} {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, file))
		if err != nil {
			return u, err
		}
		for line := range strings.Lines(string(b)) {
			words := strings.Fields(line)
			if len(words) < 2 || keys[words[0]] == nil {
				continue
			}
			kb, err := strconv.ParseInt(words[1], 10, 64)
			if err != nil {
				return u, err
			}
			*keys[words[0]] = kb << 10
		}
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return u, err
	}
	// Behind the name, which may have anything in it: utime and stime in ticks
	// of USER_HZ, which is 100 wherever Linux runs.
	words := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	for _, w := range words[11:13] {
		ticks, err := strconv.ParseInt(w, 10, 64)
		if err != nil {
			return u, err
		}
		u.CPU += time.Duration(ticks) * time.Second / 100
	}
	u.Waited, err = waited(pid)
	return u, err
}

// waited sums up the second field of /proc/PID/task/*/schedstat, in ns
// (Documentation/scheduler/sched-stats.rst).
func waited(pid int) (sum time.Duration, err error) {
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
	if err != nil {
		return 0, err
	}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue // the thread has ended since
		}
		if err != nil {
			return 0, err
		}
		words := strings.Fields(string(b))
		if len(words) < 2 {
			return 0, fmt.Errorf("%s says %q", file, b)
		}
		ns, err := strconv.ParseInt(words[1], 10, 64)
		if err != nil {
			return 0, err
		}
		sum += time.Duration(ns)
	}
	return sum, nil
}
