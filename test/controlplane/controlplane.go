// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

// Package controlplane gives tests a real kube-apiserver on a real etcd, as
// processes on loopback. There are no nodes and no controllers: objects are
// what the test makes them.
package controlplane

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/clientcmd/api"

	"github.com/podgate/podgate/test/need"
)

// AdminToken is a bearer token that may do everything.
const AdminToken = "admin"

// ControlPlane is a running etcd and kube-apiserver.
type ControlPlane struct {
	t    testing.TB
	bin  string
	dir  string
	in   func(func() error) error
	etcd *process
	api  *process
	// ports of etcd's clients and peers, and of the API server.
	ports [3]int
}

// Start starts a control plane and waits until it answers. Its processes run
// where in runs what it is given, which may be a network namespace; nil is
// here. They end with the test.
func Start(t testing.TB, in func(func() error) error) *ControlPlane {
	t.Helper()
	if in == nil {
		in = func(f func() error) error { return f() }
	}
	c := &ControlPlane{t: t, bin: need.Kubernetes(t, "etcd", "kube-apiserver"), dir: t.TempDir(), in: in}
	if err := c.prepare(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.api.end(unix.SIGKILL)
		c.etcd.end(unix.SIGKILL)
		if t.Failed() {
			t.Logf("end of the log of kube-apiserver:\n%s", c.api.tail())
		}
	})
	client := "http://127.0.0.1:" + strconv.Itoa(c.ports[0])
	c.etcd = c.start("etcd",
		"--data-dir="+filepath.Join(c.dir, "etcd"), "--unsafe-no-fsync", "--log-level=error",
		"--max-request-bytes="+strconv.Itoa(64<<20),
		"--listen-client-urls="+client, "--advertise-client-urls="+client,
		"--listen-peer-urls=http://127.0.0.1:"+strconv.Itoa(c.ports[1]))
	c.StartAPIServer()
	return c
}

// prepare chooses ports and makes what the API server reads.
func (c *ControlPlane) prepare() error {
	err := c.in(func() error {
		for i := range c.ports {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				return err
			}
			defer l.Close()
			c.ports[i] = l.Addr().(*net.TCPAddr).Port
		}
		return nil
	})
	if err != nil {
		return err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return err
	}
	return errors.Join(
		os.WriteFile(c.path("sa.key"), pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}), 0o600),
		os.WriteFile(c.path("tokens"), []byte(AdminToken+",admin,admin,system:masters\n"), 0o600),
		os.WriteFile(c.path("audit.yaml"), []byte(auditPolicy), 0o600),
	)
}

func (c *ControlPlane) path(name string) string { return filepath.Join(c.dir, name) }

// StartAPIServer starts the API server, again after [ControlPlane.StopAPIServer].
func (c *ControlPlane) StartAPIServer() {
	c.t.Helper()
	c.api = c.start("kube-apiserver",
		"--etcd-servers=http://127.0.0.1:"+strconv.Itoa(c.ports[0]),
		// What is advertised only ends up in an object; it must not be loopback.
		"--bind-address=127.0.0.1", "--advertise-address=192.0.2.1", "--secure-port="+strconv.Itoa(c.ports[2]),
		"--cert-dir="+c.path("certs"), "--token-auth-file="+c.path("tokens"), "--authorization-mode=RBAC",
		"--service-cluster-ip-range=10.96.0.0/16,fd00:10:96::/112", "--allow-privileged=true",
		"--service-account-issuer=https://kubernetes.default.svc",
		"--service-account-key-file="+c.path("sa.key"), "--service-account-signing-key-file="+c.path("sa.key"),
		// Pods are made without the controllers that give accounts to them.
		"--disable-admission-plugins=ServiceAccount", "--profiling=false",
		"--audit-policy-file="+c.path("audit.yaml"), "--audit-log-path="+c.path("audit.log"))
	c.await()
}

// StopAPIServer ends the API server, and with it every connection to it.
func (c *ControlPlane) StopAPIServer() { c.api.end(unix.SIGKILL) }

// Freeze stops the API server in the middle of whatever it does; Thaw lets it
// go on.
func (c *ControlPlane) Freeze() { c.api.signal(unix.SIGSTOP) }

// Thaw undoes Freeze.
func (c *ControlPlane) Thaw() { c.api.signal(unix.SIGCONT) }

// Store puts an object where the API server keeps it, past everything that
// would refuse it. The key is below /registry, such as
// "networkpolicies/shop/web".
func (c *ControlPlane) Store(key string, object []byte) {
	c.t.Helper()
	c.ask("kv/put", map[string][]byte{"key": []byte("/registry/" + key), "value": object}, nil)
}

// Compact makes etcd forget all that was before now, and the API server what it
// remembers of it: whoever watches from an earlier point has to begin anew.
func (c *ControlPlane) Compact() {
	c.t.Helper()
	var now struct {
		Header struct{ Revision string }
	}
	c.ask("kv/range", map[string][]byte{"key": []byte("/registry/none")}, &now)
	c.StopAPIServer()
	c.ask("kv/compaction", map[string]any{"revision": now.Header.Revision, "physical": true}, nil)
	c.StartAPIServer()
}

// ask asks etcd's gateway.
func (c *ControlPlane) ask(what string, request, answer any) {
	c.t.Helper()
	body, err := json.Marshal(request)
	if err != nil {
		c.t.Fatal(err)
	}
	client := http.Client{Transport: &http.Transport{DialContext: c.dial, DisableKeepAlives: true}}
	r, err := client.Post("http://127.0.0.1:"+strconv.Itoa(c.ports[0])+"/v3/"+what, "application/json", bytes.NewReader(body))
	if err != nil {
		c.t.Fatal(err)
	}
	defer r.Body.Close()
	if r.StatusCode != http.StatusOK {
		c.t.Fatalf("%s: %s", what, r.Status)
	}
	if answer == nil {
		return
	}
	if err := json.NewDecoder(r.Body).Decode(answer); err != nil {
		c.t.Fatalf("%s: %v", what, err)
	}
}

// Config is that of a client with a token. It dials where the server is.
func (c *ControlPlane) Config(token string) *rest.Config {
	return &rest.Config{
		Host:            "https://127.0.0.1:" + strconv.Itoa(c.ports[2]),
		BearerToken:     token,
		TLSClientConfig: rest.TLSClientConfig{CAFile: c.path("certs/apiserver.crt")},
		QPS:             -1,
		Dial:            c.dial,
	}
}

func (c *ControlPlane) dial(ctx context.Context, network, addr string) (conn net.Conn, err error) {
	err = c.in(func() error {
		conn, err = (&net.Dialer{}).DialContext(ctx, network, addr)
		return err
	})
	return conn, err
}

// Client is one that may do everything.
func (c *ControlPlane) Client() kubernetes.Interface {
	c.t.Helper()
	client, err := kubernetes.NewForConfig(c.Config(AdminToken))
	if err != nil {
		c.t.Fatal(err)
	}
	return client
}

// Kubeconfig writes a kubeconfig whose token is what a file has.
func (c *ControlPlane) Kubeconfig(tokenFile string) string {
	c.t.Helper()
	return c.kubeconfig(tokenFile, &api.Cluster{Server: c.Config("").Host, CertificateAuthority: c.path("certs/apiserver.crt")})
}

// KubeconfigVia is Kubeconfig for a proxy, by its URL.
func (c *ControlPlane) KubeconfigVia(proxy, tokenFile string) string {
	c.t.Helper()
	return c.kubeconfig(tokenFile, &api.Cluster{Server: proxy})
}

func (c *ControlPlane) kubeconfig(tokenFile string, cluster *api.Cluster) string {
	c.t.Helper()
	config := api.NewConfig()
	config.Clusters["c"] = cluster
	config.AuthInfos["u"] = &api.AuthInfo{TokenFile: tokenFile}
	config.Contexts["c"] = &api.Context{Cluster: "c", AuthInfo: "u"}
	config.CurrentContext = "c"
	path := c.path("kubeconfig-" + filepath.Base(tokenFile))
	if err := clientcmd.WriteToFile(*config, path); err != nil {
		c.t.Fatal(err)
	}
	return path
}

// auditPolicy has requests noted as they end; watches, which do not, as they
// begin.
const auditPolicy = `apiVersion: audit.k8s.io/v1
kind: Policy
rules: [{ level: Metadata, omitStages: [RequestReceived] }]
`

// Request is one that the API server was asked.
type Request struct {
	User struct {
		Username string `json:"username"`
	} `json:"user"`
	Verb      string `json:"verb"`
	ObjectRef struct {
		APIGroup string `json:"apiGroup"`
		Resource string `json:"resource"`
	} `json:"objectRef"`
	RequestURI     string `json:"requestURI"`
	ResponseStatus struct {
		Code int `json:"code"`
	} `json:"responseStatus"`
}

// Requests are those that a user has made until now.
func (c *ControlPlane) Requests(user string) []Request {
	c.t.Helper()
	b, err := os.ReadFile(c.path("audit.log"))
	if err != nil {
		c.t.Fatal(err)
	}
	var all []Request
	for line := range bytes.Lines(b) {
		var r Request
		if err := json.Unmarshal(line, &r); err != nil {
			continue // being written
		}
		if r.User.Username == user {
			all = append(all, r)
		}
	}
	return all
}

// TokenFile writes a file with a token.
func (c *ControlPlane) TokenFile(name, token string) string {
	c.t.Helper()
	path := c.path(name)
	if err := os.WriteFile(path, []byte(token), 0o600); err != nil {
		c.t.Fatal(err)
	}
	return path
}

// await waits until the API server is ready.
func (c *ControlPlane) await() {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), 2*time.Minute)
	defer cancel()
	for {
		var err error
		if _, missing := os.Stat(c.path("certs/apiserver.crt")); missing == nil {
			ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
			err = c.Client().CoreV1().RESTClient().Get().AbsPath("/readyz").Do(ctx).Error()
			cancel()
			if err == nil {
				return
			}
		}
		select {
		case <-ctx.Done():
			c.t.Fatalf("kube-apiserver is not ready: %v", err)
		case <-c.api.done:
			c.t.Fatal("kube-apiserver ended")
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// process is a program that runs.
type process struct {
	cmd  *exec.Cmd
	done chan struct{}

	mu  sync.Mutex
	log bytes.Buffer
}

func (c *ControlPlane) start(name string, args ...string) *process {
	c.t.Helper()
	p := &process{cmd: exec.Command(filepath.Join(c.bin, name), args...), done: make(chan struct{})}
	p.cmd.Dir, p.cmd.Stdout, p.cmd.Stderr = c.dir, p, p
	if err := c.in(p.cmd.Start); err != nil {
		c.t.Fatal(fmt.Errorf("start %s: %w", name, err))
	}
	go func() {
		defer close(p.done)
		_ = p.cmd.Wait() // it ends by a signal
	}()
	return p
}

// Write keeps the log.
func (p *process) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.log.Write(b)
}

// tail is the end of the log.
func (p *process) tail() []byte {
	if p == nil {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	const enough = 2 << 10
	b := p.log.Bytes()
	return bytes.Clone(b[max(0, len(b)-enough):])
}

func (p *process) signal(s unix.Signal) {
	if p != nil {
		_ = p.cmd.Process.Signal(s) // it may have ended
	}
}

func (p *process) end(s unix.Signal) {
	if p == nil {
		return
	}
	p.signal(s)
	<-p.done
}
