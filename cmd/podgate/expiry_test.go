// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"path"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"github.com/podgate/podgate/test/controlplane"
)

// gateway stands between the daemon and the API server, counts what is asked,
// and can be cut.
type gateway struct {
	url   string
	cut   atomic.Bool
	proxy *httputil.ReverseProxy

	mu    sync.Mutex
	conns map[net.Conn]struct{}
	// lists and watches asked for by resource, refused those that met a cut.
	lists, watches map[string]int
	refused        int
}

func newGateway(c *cluster) *gateway {
	c.t.Helper()
	config := c.plane.Config(controlplane.AdminToken)
	transport, err := rest.TransportFor(config)
	if err != nil {
		c.t.Fatal(err)
	}
	to, err := url.Parse(config.Host)
	if err != nil {
		c.t.Fatal(err)
	}
	g := &gateway{conns: make(map[net.Conn]struct{})}
	g.reset()
	g.proxy = httputil.NewSingleHostReverseProxy(to)
	g.proxy.Transport, g.proxy.FlushInterval = transport, -1
	g.proxy.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	server := &http.Server{Handler: g, ConnState: g.follow, ReadHeaderTimeout: time.Minute, ErrorLog: g.proxy.ErrorLog}
	err = c.node.Do(func() error {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return err
		}
		g.url = "http://" + l.Addr().String()
		go func() { _ = server.Serve(l) }() // it ends when it is closed
		return nil
	})
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { _ = server.Close() })
	return g
}

func (g *gateway) reset() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.lists, g.watches, g.refused = make(map[string]int), make(map[string]int), 0
}

// follow closes what comes while the gateway is cut.
func (g *gateway) follow(c net.Conn, s http.ConnState) {
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case s == http.StateClosed:
		delete(g.conns, c)
	case g.cut.Load():
		_ = c.Close()
		if s == http.StateNew {
			g.refused++
		}
	default:
		g.conns[c] = struct{}{}
	}
}

// sever ends every connection and lets nobody in any more.
func (g *gateway) sever() {
	g.cut.Store(true)
	g.mu.Lock()
	defer g.mu.Unlock()
	for c := range g.conns {
		_ = c.Close()
	}
}

func (g *gateway) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	g.mu.Lock()
	q, resource := r.URL.Query(), path.Base(r.URL.Path)
	switch {
	case r.Method != http.MethodGet:
	case q.Get("watch") != "" && q.Get("sendInitialEvents") != "true":
		g.watches[resource]++
	default:
		g.lists[resource]++
	}
	g.mu.Unlock()
	defer func() {
		// The server has gone in the middle of an answer.
		if err := recover(); err != nil && !errors.Is(err.(error), http.ErrAbortHandler) {
			panic(err)
		}
	}()
	g.proxy.ServeHTTP(w, r)
}

// TestWatchExpired keeps the daemon from its API server until the server cannot
// tell any more what has happened meanwhile: the daemon has to ask for all there
// is. It does so once, and what is enforced goes from what was to what is.
func TestWatchExpired(t *testing.T) {
	c := newCluster(t)
	g := newGateway(c)
	c.createPolicy(allowClient)
	c.start("--kubeconfig", c.plane.KubeconfigVia(g.url, c.plane.TokenFile("proxied", controlplane.AdminToken)))
	c.synced(0)
	for _, name := range []string{"client", "web", "other", "leaves", "again"} {
		app := name
		if name == "leaves" || name == "again" {
			app = "client"
		}
		c.attach(c.schedule(name, app))
	}
	c.synced(5)
	c.listen("web")
	c.enforced("at first")
	if !c.reaches("leaves", "web") || !c.reaches("again", "web") {
		t.Error("a client does not reach web")
	}

	severed := time.Now()
	g.sever()
	// Who was never allowed is not for a moment.
	done, leaked := make(chan struct{}), make(chan int, 1)
	go func() {
		n := 0
		for {
			select {
			case <-done:
				leaked <- n
				return
			default:
				n += c.answers("other", "web")
			}
		}
	}()
	ctx := t.Context()
	c.relabel("leaves", "other")
	if err := c.client.CoreV1().Pods("shop").Delete(ctx, "again", *metav1.NewDeleteOptions(0)); err != nil {
		t.Fatal(err)
	}
	c.schedule("again", "other") // with another UID, not attached yet
	c.deletePolicy("web")
	c.createPolicy(allowClient) // the same under another UID
	c.plane.Compact()
	c.until("said", func() bool { return hasProblem(c.status(), "what it said before stays in force") })
	c.enforced("while nothing is heard")
	g.mu.Lock()
	// Six kinds of objects, each a few times in its first seconds, then ever
	// more rarely: a machine that is slow here has longer to try.
	if limit := 60 + 6*int(time.Since(severed)/time.Second); g.refused > limit {
		t.Errorf("%d connections were tried while there were none, want at most %d", g.refused, limit)
	}
	g.mu.Unlock()

	g.reset()
	g.cut.Store(false)
	c.until("told anew", func() bool { return c.answers("leaves", "web") == 0 && len(c.status().Problems) == 0 })
	close(done)
	if n := <-leaked; n > 0 {
		t.Errorf("%d connections were answered that never were allowed", n)
	}
	c.enforced("after all was told anew")
	// The former pod's endpoint is not that of the pod of its name.
	if c.answers("again", "web") != 0 {
		t.Error("a pod that is gone goes on")
	}
	c.relabel("leaves", "client")
	c.until("followed again", func() bool { return c.answers("leaves", "web") == len(c.addrs["web"]) })
	g.mu.Lock()
	defer g.mu.Unlock()
	for resource, n := range g.lists {
		if n > 2 { // the first one may meet a server that is not ready
			t.Errorf("%s were listed %d times", resource, n)
		}
	}
	if g.lists["pods"] == 0 || g.lists["networkpolicies"] == 0 {
		t.Errorf("nothing expired: lists %v, watches %v", g.lists, g.watches)
	}
	t.Logf("lists %v, watches %v", g.lists, g.watches)
}
