// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package cluster

import (
	"bufio"
	"bytes"
	"context"
	_ "embed" // init.sh
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"
	"golang.org/x/sys/unix"
)

// initScript is PID 1 of a machine.
//
//go:embed init.sh
var initScript string

// Machine is a set of namespaces (mount, UTS, IPC, network, PID) that plays a
// machine.
type Machine struct {
	// Name is its host name.
	Name string
	// Dir is the machine's part of the cluster's scratch directory: logs are
	// in it, one file for each process.
	Dir string

	init  *exec.Cmd
	pidfd int
	net   ns.NetNS
	ended chan struct{}
}

// Kinds of machine.
const (
	controlPlane = "control-plane"
	node         = "node"
)

// startMachine starts PID 1, which makes the machine's view of the file system.
func startMachine(name, kind, dir, cgroup string) (_ *Machine, err error) {
	m := &Machine{Name: name, Dir: dir, pidfd: -1, ended: make(chan struct{})}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("machine %s: %w", name, err), m.Close())
		}
	}()
	if err := os.MkdirAll(filepath.Join(dir, "files"), 0o755); err != nil {
		return nil, err
	}
	log, err := os.Create(filepath.Join(dir, "init.log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.Command("bash", "-c", initScript)
	cmd.Env = append(os.Environ(), "NAME="+name, "KIND="+kind, "DIR="+dir, "CGROUP="+cgroup)
	cmd.Stderr = log
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC | unix.CLONE_NEWNET | unix.CLONE_NEWPID,
		Pdeathsig:  unix.SIGKILL, // and with PID 1 the kernel ends all the others
		Setsid:     true,
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	started := make(chan error)
	go func() {
		// The signal comes when the thread ends that started the process.
		runtime.LockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // killed
			close(m.ended)
		}
	}()
	if err := <-started; err != nil {
		return nil, err
	}
	m.init = cmd
	if m.pidfd, err = unix.PidfdOpen(cmd.Process.Pid, 0); err != nil {
		return nil, fmt.Errorf("pidfd_open: %w", err)
	}
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if line != "ready\n" {
		text, _ := os.ReadFile(log.Name())
		return nil, fmt.Errorf("init: %w\n%s", err, text)
	}
	m.net, err = ns.GetNS(fmt.Sprintf("/proc/%d/ns/net", cmd.Process.Pid))
	return m, err
}

// Close ends every process of the machine.
func (m *Machine) Close() error {
	var errs []error
	if m.init != nil {
		if err := m.init.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
			errs = append(errs, err)
		}
		<-m.ended
	}
	if m.net != nil {
		errs = append(errs, m.net.Close())
	}
	if m.pidfd >= 0 {
		errs = append(errs, unix.Close(m.pidfd))
	}
	return errors.Join(errs...)
}

// PID of the machine's PID 1, as this process sees it.
func (m *Machine) PID() int { return m.init.Process.Pid }

// Do runs fn in the machine's network namespace, on this thread only.
func (m *Machine) Do(fn func() error) error {
	return m.net.Do(func(ns.NetNS) error { return fn() })
}

// start starts a command in all namespaces of the machine.
func (m *Machine) start(cmd *exec.Cmd) error {
	const namespaces = unix.CLONE_NEWNS | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC | unix.CLONE_NEWNET | unix.CLONE_NEWPID
	started := make(chan error)
	go func() {
		// The thread is not given back: it ends with the goroutine.
		runtime.LockOSThread()
		// A mount namespace can be joined by who shares no file system view.
		err := unix.Unshare(unix.CLONE_FS)
		if err == nil {
			err = unix.Setns(m.pidfd, namespaces)
		}
		if err == nil {
			err = cmd.Start()
		}
		started <- err
	}()
	if err := <-started; err != nil {
		return fmt.Errorf("%s: start %s: %w", m.Name, cmd.Path, err)
	}
	return nil
}

// Exec runs a command in the machine to its end and returns its stdout; the
// error carries its stderr. The path must be one of the machine.
func (m *Machine) Exec(ctx context.Context, path string, args ...string) ([]byte, error) {
	return m.ExecInput(ctx, nil, path, args...)
}

// ExecInput is [Machine.Exec] with stdin.
func (m *Machine) ExecInput(ctx context.Context, stdin io.Reader, path string, args ...string) ([]byte, error) {
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Dir = "/"
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, &stdout, &stderr
	if err := m.start(cmd); err != nil {
		return nil, err
	}
	if err := cmd.Wait(); err != nil {
		return stdout.Bytes(), fmt.Errorf("%s: %s %s: %w\n%s", m.Name, filepath.Base(path), strings.Join(args, " "), err, stderr.Bytes())
	}
	return stdout.Bytes(), nil
}

// Command is a long-running program of a machine.
type Command struct {
	Path string
	Args []string
	// Env is added to the environment.
	Env []string
}

// Process is a running program of a machine. Its output is appended to a log
// file, so that a program that is started again adds to it.
type Process struct {
	Command
	Log string

	name    string
	machine *Machine
	cmd     *exec.Cmd
	done    chan struct{}
	err     error
}

// Start starts a program; name names its log.
func (m *Machine) Start(name string, c Command) (*Process, error) {
	p := &Process{Command: c, Log: filepath.Join(m.Dir, name+".log"), name: name, machine: m}
	return p, p.Start()
}

// Start starts the program again after [Process.Kill] or [Process.Stop].
func (p *Process) Start() error {
	log, err := os.OpenFile(p.Log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(p.Path, p.Args...)
	cmd.Dir = "/"
	cmd.Env = append(os.Environ(), p.Env...)
	cmd.Stdout, cmd.Stderr = log, log
	if err := p.machine.start(cmd); err != nil {
		return err
	}
	done := make(chan struct{})
	p.cmd, p.done = cmd, done
	go func() {
		p.err = cmd.Wait()
		close(done)
	}()
	return nil
}

// PID of the process, as this process sees it.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Ended tells whether the process has ended, and how.
func (p *Process) Ended() (bool, error) {
	select {
	case <-p.done:
		return true, p.err
	default:
		return false, nil
	}
}

// Wait waits until the process ends and returns how it did.
func (p *Process) Wait(ctx context.Context) error {
	select {
	case <-p.done:
		return p.err
	case <-ctx.Done():
		return fmt.Errorf("%s: %s: %w", p.machine.Name, p.name, ctx.Err())
	}
}

// Kill ends the process without a chance to do anything about it.
func (p *Process) Kill() error {
	if err := p.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	<-p.done
	return nil
}

// stopTimeout is how long a process may take to end when asked to.
const stopTimeout = 30 * time.Second

// Stop asks the process to end and waits until it has.
func (p *Process) Stop(ctx context.Context) error {
	if err := p.cmd.Process.Signal(unix.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, stopTimeout)
	defer cancel()
	select {
	case <-p.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%s: %s did not stop: %w", p.machine.Name, p.name, ctx.Err())
	}
}
