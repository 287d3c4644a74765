// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package tracer_test

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/podgate/podgate/test/tracer"
)

func TestMain(m *testing.M) {
	tracer.Main()
	os.Exit(m.Run())
}

// A program and those that it starts are asked about each of their changes, and
// about nothing else.
func TestRun(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("a filter that outlives execve(2) needs root")
	}
	const script = "set -C; echo x >$0/file; mkdir $0/dir; mv $0/file $0/dir/file; cat $0/dir/file; ln -s x $0/link; rm $0/link"
	names := func(calls []tracer.Call, dir string) (all []string) {
		for _, c := range calls {
			all = append(all, strings.ReplaceAll(c.String(), dir, "D"))
		}
		return all
	}
	run := func(dir string, n int) (calls []tracer.Call, out string, err error) {
		var b strings.Builder
		cmd := exec.CommandContext(t.Context(), "sh", "-c", script, dir)
		cmd.Stdout = &b
		err = tracer.Run(cmd, func(c tracer.Call) bool {
			calls = append(calls, c)
			return len(calls) <= n
		})
		return calls, b.String(), err
	}

	dir := t.TempDir()
	calls, out, err := run(dir, 1000)
	if err != nil || out != "x\n" {
		t.Fatalf("it prints %q (%v)", out, err)
	}
	all := names(calls, dir)
	for _, want := range []string{"openat D/file", "symlinkat D/link", "unlinkat D/link"} {
		if !slices.Contains(all, want) {
			t.Errorf("no %q in %q", want, all)
		}
	}
	for _, not := range all {
		if strings.Contains(not, "/dir/file") && strings.HasPrefix(not, "openat") {
			t.Errorf("asked about reading: %q", all)
		}
	}

	// The shell is killed before the first change, and its children are not.
	dir = t.TempDir()
	calls, out, err = run(dir, 0)
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL || out != "" {
		t.Errorf("it was not killed: %v, %q", err, out)
	}
	if got := names(calls, dir); !slices.Equal(got, []string{"openat D/file"}) {
		t.Errorf("it was killed at %q", got)
	}
	if left, err := filepath.Glob(filepath.Join(dir, "*")); err != nil || len(left) > 0 {
		t.Errorf("it has made %q (%v)", left, err)
	}
}

// What cannot be executed is an error, and not one that hangs.
func TestRunNothing(t *testing.T) {
	err := tracer.Run(exec.CommandContext(t.Context(), filepath.Join(t.TempDir(), "none")), func(tracer.Call) bool { return true })
	if err == nil {
		t.Error("a program that is not there was run")
	}
}
