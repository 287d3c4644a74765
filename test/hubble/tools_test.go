// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

// Package hubble lets Hubble's own programs and filters, as they are, meet
// podgate observe.
package hubble

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"testing"

	relay "github.com/cilium/cilium/hubble-relay/cmd"
	hubble "github.com/cilium/cilium/hubble/cmd"
)

// asProgram makes the test binary be one of Hubble's programs.
const asProgram = "PODGATE_TEST_AS"

func TestMain(m *testing.M) {
	var err error
	switch os.Getenv(asProgram) {
	case "hubble":
		err = hubble.Execute()
	case "hubble-relay":
		err = relay.New().Execute()
	default:
		os.Exit(m.Run())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// program is one of Hubble's, as a process of its own.
func program(ctx context.Context, t *testing.T, name string, args ...string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(ctx, self, args...)
	cmd.Env = append(os.Environ(), asProgram+"="+name, "HOME="+t.TempDir())
	return cmd
}

// output runs Hubble's command line and answers what it prints.
func output(t *testing.T, in func(func() error) error, args ...string) (string, error) {
	t.Helper()
	cmd := program(t.Context(), t, "hubble", args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := in(cmd.Run); err != nil {
		var exit *exec.ExitError
		if !errors.As(err, &exit) {
			t.Fatal(err)
		}
		return out.String(), fmt.Errorf("hubble %v: %w\n%s", args, err, errs.String())
	}
	return out.String(), nil
}
