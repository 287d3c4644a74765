// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package netlab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Options of a node.
type Options struct {
	// Plugins is the directory of CNI binaries, filled by [Build].
	Plugins string
	// Stderr gets what plugins log; os.Stderr when nil.
	Stderr io.Writer
}

// Node is a network namespace that plays a node. Its methods may be used by
// many goroutines at once.
type Node struct {
	// BPFFS is the path of a bpffs that only this node uses.
	BPFFS string
	// Dir is a scratch directory: for host-local's dataDir, policy
	// directories, sockets. [Node.Close] removes it.
	Dir string
	// Plugins is the directory of CNI binaries.
	Plugins string

	ns    *namespace
	bpffs *os.File
	cni   *libcni.CNIConfig
}

// New makes a node. The caller must close it.
func New(o Options) (_ *Node, err error) {
	n := &Node{Plugins: o.Plugins}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("netlab: new node: %w", err), n.Close())
		}
	}()
	if n.ns, err = newNamespace(); err != nil {
		return nil, err
	}
	if n.bpffs, err = newBPFFS(); err != nil {
		return nil, err
	}
	n.BPFFS = fdPath(n.bpffs.Fd())
	if n.Dir, err = os.MkdirTemp("", "netlab-"); err != nil {
		return nil, err
	}
	if o.Stderr == nil {
		o.Stderr = os.Stderr
	}
	n.cni = libcni.NewCNIConfigWithCacheDir([]string{n.Plugins}, filepath.Join(n.Dir, "cni-cache"),
		&invoke.DefaultExec{RawExec: &invoke.RawExec{Stderr: o.Stderr}})
	return n, nil
}

// Close ends the node: its namespace with every interface in it, its bpffs
// with every pin in it, its scratch directory. Pods are closed by
// [Node.DelPod] or [Pod.Close], before or after.
func (n *Node) Close() error {
	var errs []error
	if n.ns != nil {
		errs = append(errs, n.ns.Close())
	}
	if n.bpffs != nil {
		errs = append(errs, n.bpffs.Close())
	}
	if n.Dir != "" {
		errs = append(errs, os.RemoveAll(n.Dir))
	}
	return errors.Join(errs...)
}

// NetNS is a path of the node's network namespace.
func (n *Node) NetNS() string { return n.ns.path() }

// Do runs fn in the node's network namespace. Processes that fn starts live
// there; goroutines that it starts do not.
func (n *Node) Do(fn func() error) error { return n.ns.do(fn) }

// Exec runs a command in the node's network namespace and returns what it
// prints to stdout; the error carries stderr.
func (n *Node) Exec(ctx context.Context, name string, args ...string) ([]byte, error) {
	return n.ns.exec(ctx, name, args...)
}

// namespace is a network namespace that ends with its last descriptor,
// interface user and process.
type namespace struct{ ns.NetNS }

// newNamespace makes a namespace with loopback up and without duplicate
// address detection, which would keep every IPv6 address unusable for a
// second or two.
func newNamespace() (_ *namespace, err error) {
	temp, err := ns.TempNetNS()
	if err != nil {
		return nil, err
	}
	n := &namespace{temp}
	defer func() {
		if err != nil {
			temp.Close()
		}
	}()
	err = n.do(func() error {
		for _, which := range []string{"all", "default"} {
			err := os.WriteFile("/proc/sys/net/ipv6/conf/"+which+"/accept_dad", []byte("0"), 0)
			if err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	h, err := netlink.NewHandleAt(netns.NsHandle(temp.Fd()), unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	defer h.Close()
	lo, err := h.LinkByName("lo")
	if err != nil {
		return nil, err
	}
	return n, h.LinkSetUp(lo)
}

func (n *namespace) path() string { return fdPath(n.Fd()) }

func (n *namespace) do(fn func() error) error {
	return n.Do(func(ns.NetNS) error { return fn() })
}

func (n *namespace) exec(ctx context.Context, name string, args ...string) ([]byte, error) {
	var out []byte
	err := n.do(func() error {
		var err error
		out, err = exec.CommandContext(ctx, name, args...).Output()
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			err = fmt.Errorf("%w: %s", err, exit.Stderr)
		}
		return err
	})
	if err != nil {
		return out, fmt.Errorf("%s %v: %w", name, args, err)
	}
	return out, nil
}

// newBPFFS mounts a bpffs nowhere: the descriptor is the only way to it, and
// closing it unmounts. Needs Linux 5.2.
func newBPFFS() (*os.File, error) {
	fs, err := unix.Fsopen("bpf", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("fsopen bpf: %w", err)
	}
	defer unix.Close(fs)
	if err := unix.FsconfigCreate(fs); err != nil {
		return nil, fmt.Errorf("fsconfig bpf: %w", err)
	}
	fd, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("fsmount bpf: %w", err)
	}
	return os.NewFile(uintptr(fd), "bpffs"), nil
}

// HasTCX tells whether the kernel has tcx hooks. They came with Linux 6.6; that
// a newer kernel cannot do it is for tests to find.
func HasTCX() (bool, error) { return KernelAtLeast(6, 6) }

// KernelAtLeast tells whether the kernel is of a version or newer.
func KernelAtLeast(major, minor int) (bool, error) {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return false, fmt.Errorf("netlab: uname: %w", err)
	}
	release := unix.ByteSliceToString(name.Release[:])
	var a, b int
	if _, err := fmt.Sscanf(release, "%d.%d", &a, &b); err != nil {
		return false, fmt.Errorf("netlab: kernel release %q: %w", release, err)
	}
	return a > major || a == major && b >= minor, nil
}

func fdPath(fd uintptr) string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), fd) }
