// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

// Package tracer runs a program as it is, and stops it before each system call
// that changes something which outlives it: files, links, directories, mounts,
// pins and maps of eBPF. Tests end a process there, or do something else
// meanwhile.
//
// The kernel asks the tracer by way of a seccomp filter (seccomp_unotify(2),
// Linux 5.9), which the program inherits. It runs at full speed in between, and
// calls of all its threads come in one order.
package tracer

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Call is a system call that a program is about to make.
type Call struct {
	// Name is the kernel's, with the command of bpf(2).
	Name string
	// Path that it changes, as the program says it; empty where it says none.
	Path string
}

func (c Call) String() string { return strings.TrimSpace(c.Name + " " + c.Path) }

// traced is the environment variable that makes a test binary become the
// program to trace.
const traced = "PODGATE_TEST_TRACED"

// channel is the socket on which that one sends its filter's descriptor.
const channel = 3

// Main has to be called by the TestMain of tests that use [Run].
func Main() {
	if os.Getenv(traced) == "" {
		return
	}
	fmt.Fprintln(os.Stderr, "tracer:", become(os.Args[1], os.Args[2:]))
	os.Exit(1)
}

// become executes a program under the filter. It returns if that fails.
func become(path string, args []string) error {
	runtime.LockOSThread() // The filter is the thread's.
	unix.CloseOnExec(channel)
	if err := os.Unsetenv(traced); err != nil {
		return err
	}
	program, err := filter()
	if err != nil {
		return err
	}
	listener, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_NEW_LISTENER,
		uintptr(unsafe.Pointer(&unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]})))
	if errno != 0 {
		return fmt.Errorf("seccomp: %w", errno)
	}
	if err := unix.Sendmsg(channel, []byte{0}, unix.UnixRights(int(listener)), nil, 0); err != nil {
		return fmt.Errorf("send the filter: %w", err)
	}
	return fmt.Errorf("execute %s: %w", path, unix.Exec(path, args, os.Environ()))
}

// Run starts a command, and returns as its Wait does. before is called with each
// call, and the command makes it when before returns; if that returns false it
// never does, since it is killed. So are threads that wait for before at that
// moment. A command that starts others should outlive them.
func Run(cmd *exec.Cmd, before func(Call) (goOn bool)) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	ours, theirs, err := socketPair()
	if err != nil {
		return err
	}
	defer ours.Close()
	cmd.Args = append([]string{self, cmd.Path}, cmd.Args...)
	cmd.Path = self
	cmd.Env = append(cmd.Environ(), traced+"=1")
	cmd.ExtraFiles = []*os.File{theirs}
	err = cmd.Start()
	theirs.Close()
	if err != nil {
		return err
	}
	listener, err := receive(ours)
	if err == nil {
		err = follow(listener, cmd.Process, before)
		listener.Close()
	}
	if err != nil {
		err = errors.Join(err, cmd.Process.Kill())
	}
	return errors.Join(err, cmd.Wait())
}

func socketPair() (ours *net.UnixConn, theirs *os.File, err error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	theirs = os.NewFile(uintptr(pair[1]), "traced")
	file := os.NewFile(uintptr(pair[0]), "tracer")
	defer file.Close()
	c, err := net.FileConn(file)
	if err != nil {
		theirs.Close()
		return nil, nil, err
	}
	return c.(*net.UnixConn), theirs, nil
}

// receive gets the descriptor of a filter.
func receive(c *net.UnixConn) (*os.File, error) {
	control := make([]byte, unix.CmsgSpace(4))
	n, size, _, _, err := c.ReadMsgUnix(make([]byte, 1), control)
	if err != nil {
		return nil, fmt.Errorf("receive the filter: %w", err)
	}
	if n == 0 {
		return nil, errors.New("receive the filter: the program has ended")
	}
	messages, err := unix.ParseSocketControlMessage(control[:size])
	if err != nil {
		return nil, fmt.Errorf("receive the filter: %w", err)
	}
	if len(messages) != 1 {
		return nil, fmt.Errorf("receive the filter: %d control messages", len(messages))
	}
	files, err := unix.ParseUnixRights(&messages[0])
	if err != nil {
		return nil, fmt.Errorf("receive the filter: %w", err)
	}
	unix.CloseOnExec(files[0])
	return os.NewFile(uintptr(files[0]), "seccomp"), nil
}

// notification is struct seccomp_notif, and response struct seccomp_notif_resp
// (linux/seccomp.h).
type notification struct {
	id         uint64
	pid, flags uint32
	nr         int32
	arch       uint32
	ip         uint64
	args       [6]uint64
}

type response struct {
	id    uint64
	val   int64
	err   int32
	flags uint32
}

// goOn is SECCOMP_USER_NOTIF_FLAG_CONTINUE.
const goOn = 1

// follow answers the kernel until nobody has the filter any more.
func follow(listener *os.File, process *os.Process, before func(Call) bool) error {
	for {
		fds := []unix.PollFd{{Fd: int32(listener.Fd()), Events: unix.POLLIN}}
		if _, err := unix.Poll(fds, -1); errors.Is(err, unix.EINTR) {
			continue
		} else if err != nil {
			return fmt.Errorf("poll: %w", err)
		}
		if fds[0].Revents&unix.POLLIN == 0 {
			return nil
		}
		var n notification
		err := control(listener, unix.SECCOMP_IOCTL_NOTIF_RECV, unsafe.Pointer(&n))
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINTR) {
			continue // The caller has been killed meanwhile.
		}
		if err != nil {
			return fmt.Errorf("receive a call: %w", err)
		}
		if !before(n.call()) {
			if err := process.Kill(); err != nil {
				return err
			}
			continue
		}
		err = control(listener, unix.SECCOMP_IOCTL_NOTIF_SEND, unsafe.Pointer(&response{id: n.id, flags: goOn}))
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("answer a call: %w", err)
		}
	}
}

func control(f *os.File, request uintptr, arg unsafe.Pointer) error {
	if _, _, errno := syscall.Syscall(unix.SYS_IOCTL, f.Fd(), request, uintptr(arg)); errno != 0 {
		return errno
	}
	return nil
}
