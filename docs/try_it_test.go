// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package docs

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestTryIt runs what try-it.md asks podgate, and compares the answers.
func TestTryIt(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("the kernel's answer needs root")
	}
	podgate := filepath.Join(t.TempDir(), "podgate")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", podgate, "../cmd/podgate").CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	answered := 0
	for _, block := range fenced(pages(t)["try-it.md"], "console") {
		for _, call := range strings.Split("\n"+block, "\n# ") {
			line, answer, _ := strings.Cut(call, "\n")
			args, ours := strings.CutPrefix(line, "bin/podgate ")
			if !ours {
				continue
			}
			cmd := exec.CommandContext(t.Context(), podgate, strings.Fields(args)...)
			cmd.Dir = ".."
			out, err := cmd.Output()
			var exit *exec.ExitError
			if errors.As(err, &exit) {
				t.Errorf("%s: %v\n%s", line, err, exit.Stderr)
			} else if err != nil {
				t.Fatal(err)
			}
			if want, _, more := strings.Cut(answer, "…"); more {
				answered++
				if !strings.HasPrefix(string(out), want) {
					t.Errorf("%s prints\n%s\nthe page has\n%s", line, out, want)
				}
			}
			if strings.Contains(string(out), "differ") {
				t.Errorf("%s: compiler and kernel differ:\n%s", line, out)
			}
		}
	}
	if answered != 2 {
		t.Errorf("the page has %d answers", answered)
	}
}
