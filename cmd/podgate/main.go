// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

// Command podgate is the node's binary: the sync daemon, and the questions a
// person asks about what is enforced. Reading commands change nothing.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/term"
)

// version is set by the linker.
var version = "unknown"

// env is what a command has of the process it runs in.
type env struct {
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	Getenv         func(string) string
	Now            func() time.Time
	// Terminal says that Stdout is one, with Width columns.
	Terminal bool
	Width    int
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	e := env{Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr, Getenv: os.Getenv, Now: time.Now}
	if width, _, err := term.GetSize(int(os.Stdout.Fd())); err == nil {
		e.Terminal, e.Width = true, width
	}
	code := run(ctx, e, os.Args[1:])
	stop()
	os.Exit(code)
}

// The exit codes beside 0.
const (
	exitError = 1
	// exitProblem: the command did what it was asked, and found something
	// wrong: standing problems, or a kernel that judges otherwise than policy.
	exitProblem = 2
)

// errProblem is the error of a command that has already said what it found.
var errProblem = errors.New("problems found")

// run runs a command line and returns its exit code.
func run(ctx context.Context, e env, args []string) int {
	root := newRoot(e)
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	switch {
	case err == nil:
		return 0
	case errors.Is(err, errProblem):
		return exitProblem
	}
	e.complain("podgate: %v\n", err)
	if hint := hintFor(err); hint != "" {
		e.complain("  %s\n", hint)
	}
	return exitError
}

// complain writes to Stderr. If that fails there is nobody left to tell.
func (e env) complain(format string, args ...any) { _, _ = fmt.Fprintf(e.Stderr, format, args...) }
