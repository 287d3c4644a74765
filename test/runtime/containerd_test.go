// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package runtime

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"text/template"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podgate/podgate/test/need"
	"github.com/podgate/podgate/test/netlab"
)

// containerd is a containerd that shares nothing with the machine's own.
type containerd struct {
	cri.RuntimeServiceClient

	process *exec.Cmd
	conn    *grpc.ClientConn
	log     string
	socket  string
	// path is where its programs are looked for (environ(7)).
	path      string
	sandboxes []string
}

// config is written for containerd 1.6, in which Debian 12 has it; newer ones
// migrate it. Scores and limits stay as they are: raising them needs
// CAP_SYS_RESOURCE, which not every machine grants its root.
var config = template.Must(template.New("config").Parse(`
version = 2
root = "{{.Dir}}/root"
state = "{{.Dir}}/state"
[grpc]
  address = "{{.Dir}}/containerd.sock"
[plugins."io.containerd.internal.v1.opt"]
  path = "{{.Dir}}/opt"
[plugins."io.containerd.grpc.v1.cri"]
  disable_tcp_service = true
  netns_mounts_under_state_dir = true
  restrict_oom_score_adj = true
  sandbox_image = "{{.Image}}"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{{.Plugins}}"
    conf_dir = "{{.Dir}}/net.d"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "native"
`))

// eachContainerd runs a test under the machine's containerd, and under the one
// that "make test-e2e" builds. The test gets the directory of its programs,
// which is empty for the machine's.
func eachContainerd(t *testing.T, test func(t *testing.T, programs string)) {
	if os.Getuid() != 0 {
		t.Skip("containers need root")
	}
	t.Run("machine", func(t *testing.T) {
		need.Tools(t, "containerd", "ctr", "runc", "nsenter")
		test(t, "")
	})
	t.Run("v2", func(t *testing.T) {
		need.Tools(t, "runc", "nsenter")
		test(t, need.Kubernetes(t, "containerd", "containerd-shim-runc-v2", "ctr"))
	})
}

// startContainerd runs containerd on node with the conflist as its only
// network, and waits until it is ready for pods. Its programs are those in the
// directory, or the machine's.
func startContainerd(
	ctx context.Context, programs string, node *netlab.Node, list netlab.Conflist,
) (_ *containerd, err error) {
	dir := filepath.Join(node.Dir, "containerd")
	c := &containerd{
		log:    filepath.Join(dir, "log"),
		socket: filepath.Join(dir, "containerd.sock"),
		path:   os.Getenv("PATH"),
	}
	if programs != "" {
		c.path = programs + string(os.PathListSeparator) + c.path
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("containerd: %w", err), c.Close())
		}
	}()
	if err := os.MkdirAll(filepath.Join(dir, "net.d"), 0o700); err != nil {
		return nil, err
	}
	conflist, err := list.JSON()
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(dir, "net.d", "10-lab.conflist"), conflist, 0o600); err != nil {
		return nil, err
	}
	file, err := os.Create(filepath.Join(dir, "config.toml"))
	if err != nil {
		return nil, err
	}
	defer file.Close()
	err = config.Execute(file, struct{ Dir, Plugins, Image string }{dir, node.Plugins, imageName})
	if err != nil {
		return nil, err
	}
	log, err := os.Create(c.log)
	if err != nil {
		return nil, err
	}
	defer log.Close()

	// libcni's cache is where it always is, and its own.
	if err := errors.Join(os.MkdirAll(c.cache(), 0o700), os.MkdirAll(c.logs(), 0o700)); err != nil {
		return nil, err
	}
	c.process = exec.Command("sh", "-c", `mkdir -p /var/lib/cni && mount --bind "$1" /var/lib/cni && exec containerd --config "$2"`,
		"containerd", c.cache(), file.Name())
	c.process.Env = append(os.Environ(), "PATH="+c.path)
	c.process.Stdout, c.process.Stderr = log, log
	// Its mounts end with it and with its pods.
	c.process.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	if err := node.Do(c.process.Start); err != nil {
		c.process = nil
		return nil, err
	}
	c.conn, err = grpc.NewClient("unix://"+c.socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, err
	}
	c.RuntimeServiceClient = cri.NewRuntimeServiceClient(c.conn)
	if err := c.waitReady(ctx); err != nil {
		return nil, err
	}
	image := filepath.Join(dir, "image.tar")
	if err := writeImage(ctx, image); err != nil {
		return nil, err
	}
	return c, c.load(ctx, image)
}

// load imports the images of a file. What is run of them is unpacked then. The
// other flags are those of `kind load image-archive`.
func (c *containerd) load(ctx context.Context, file string) error {
	// Not by exec.LookPath: PATH is that of containerd.
	load := exec.CommandContext(ctx, "sh", "-c", `exec ctr "$@"`, "ctr", "--address", c.socket, "--namespace", "k8s.io",
		"images", "import", "--no-unpack", "--all-platforms", "--digests", file)
	load.Env = append(os.Environ(), "PATH="+c.path)
	out, err := load.CombinedOutput()
	if err != nil {
		return fmt.Errorf("ctr images import: %w\n%s", err, out)
	}
	return nil
}

// cache is the directory that containerd has as /var/lib/cni.
func (c *containerd) cache() string { return filepath.Join(filepath.Dir(c.log), "cni") }

// logs is the directory of what containers print.
func (c *containerd) logs() string { return filepath.Join(filepath.Dir(c.log), "logs") }

// networks is the directory of network configurations.
func (c *containerd) networks() string { return filepath.Join(filepath.Dir(c.log), "net.d") }

// waitReady returns when both conditions that a kubelet looks at hold.
func (c *containerd) waitReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		reply, err := c.Status(ctx, &cri.StatusRequest{}, grpc.WaitForReady(true))
		if err != nil {
			return err
		}
		ready := true
		for _, condition := range reply.GetStatus().GetConditions() {
			// There are others, of what is deprecated.
			if condition.GetType() == cri.RuntimeReady || condition.GetType() == cri.NetworkReady {
				ready = ready && condition.GetStatus()
			}
		}
		if ready {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("not ready: %v", reply.GetStatus())
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// pod is a running sandbox and what the kubelet would know of it.
type pod struct {
	sandbox   string
	config    *cri.PodSandboxConfig
	address   string
	container string
}

// runPod starts a sandbox, which listens on port 8080.
func (c *containerd) runPod(ctx context.Context, namespace, name, uid string) (*pod, error) {
	p := &pod{config: &cri.PodSandboxConfig{
		Metadata:     &cri.PodSandboxMetadata{Namespace: namespace, Name: name, Uid: uid},
		LogDirectory: c.logs(),
		Linux:        &cri.LinuxPodSandboxConfig{},
	}}
	run, err := c.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: p.config})
	if err != nil {
		return nil, fmt.Errorf("run pod %s: %w", name, err)
	}
	p.sandbox = run.GetPodSandboxId()
	c.sandboxes = append(c.sandboxes, p.sandbox)
	status, err := c.PodSandboxStatus(ctx, &cri.PodSandboxStatusRequest{PodSandboxId: p.sandbox})
	if err != nil {
		return nil, fmt.Errorf("status of pod %s: %w", name, err)
	}
	p.address = status.GetStatus().GetNetwork().GetIp()
	return p, nil
}

// container is the one of p to execute commands in, started when first asked
// for.
func (c *containerd) container(ctx context.Context, p *pod) (string, error) {
	if p.container != "" {
		return p.container, nil
	}
	var err error
	p.container, err = c.start(ctx, p, &cri.ContainerConfig{
		Metadata: &cri.ContainerMetadata{Name: "main"},
		Image:    &cri.ImageSpec{Image: imageName},
		Args:     []string{"serve", ":8081"},
	})
	return p.container, err
}

// start runs a container in p.
func (c *containerd) start(ctx context.Context, p *pod, config *cri.ContainerConfig) (id string, err error) {
	config.Linux = &cri.LinuxContainerConfig{}
	create, err := c.CreateContainer(ctx, &cri.CreateContainerRequest{
		PodSandboxId: p.sandbox, SandboxConfig: p.config, Config: config,
	})
	if err != nil {
		return "", fmt.Errorf("create container of %s in %s: %w", config.GetImage().GetImage(), p.config.GetMetadata().GetName(), err)
	}
	if _, err := c.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: create.GetContainerId()}); err != nil {
		return "", fmt.Errorf("start container of %s in %s: %w", config.GetImage().GetImage(), p.config.GetMetadata().GetName(), err)
	}
	return create.GetContainerId(), nil
}

// removePods ends every sandbox and its containers.
func (c *containerd) removePods(ctx context.Context) error {
	var errs []error
	for _, sandbox := range c.sandboxes {
		if _, err := c.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: sandbox}); err != nil {
			errs = append(errs, fmt.Errorf("stop pod: %w", err))
		}
		if _, err := c.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: sandbox}); err != nil {
			errs = append(errs, fmt.Errorf("remove pod: %w", err))
		}
	}
	c.sandboxes = nil
	return errors.Join(errs...)
}

// Close ends every pod and then containerd.
func (c *containerd) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	errs := []error{c.removePods(ctx)}
	if c.conn != nil {
		errs = append(errs, c.conn.Close())
	}
	if c.process != nil {
		errs = append(errs, c.process.Process.Signal(syscall.SIGTERM), c.process.Wait())
	}
	return errors.Join(errs...)
}
