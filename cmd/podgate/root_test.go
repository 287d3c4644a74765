// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// command runs a command line in this process.
func command(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	e := env{
		Stdin: strings.NewReader(""), Stdout: &out, Stderr: &errs,
		Getenv: func(string) string { return "" }, Now: time.Now,
	}
	code = run(t.Context(), e, args)
	return code, out.String(), errs.String()
}

func TestCommandLine(t *testing.T) {
	nowhere := []string{"--bpffs", filepath.Join(t.TempDir(), "none"), "--run-dir", t.TempDir()}
	for _, tt := range []struct {
		name           string
		args           []string
		code           int
		stdout, stderr string // parts of
	}{
		{"help", []string{"--help"}, 0, "explain", ""},
		{"version", []string{"version"}, 0, "podgate unknown, pinned layout v1\n", ""},
		{"version as JSON", []string{"version", "-o", "json"}, 0, `"abi": 1`, ""},
		{"completion", []string{"completion", "bash"}, 0, "__start_podgate", ""},
		{"flag completion", []string{"__complete", "flows", "--verdict", ""}, 0, "denied", ""},
		{"unknown command", []string{"describe"}, 1, "", `unknown command "describe"`},
		{"unknown output", []string{"status", "-o", "yaml"}, 1, "", `output "yaml" is not one of [text json]`},
		{"unknown log level", []string{"status", "--log-level", "loud"}, 1, "", "loud"},
		{"missing flag", []string{"sync"}, 1, "", "policy-dir"},
		{"extra argument", []string{"status", "x"}, 1, "", `"x"`},
		{"bad port", []string{"explain", "--from", "a", "--to", "b", "--port", "http"}, 1, "", `port "http" is not like 80/TCP`},
		{"bad ports", []string{"matrix", "--ports", "80,TCP"}, 1, "", `port "TCP" is not like 80/TCP`},
		{"bad verdict", []string{"flows", "--verdict", "dropped"}, 1, "", `--verdict "dropped" is not one of allowed, denied, audited`},
		{"bad peer", []string{"flows", "--peer", "a/b/c"}, 1, "", `--peer "a/b/c" is no address, CIDR or pod`},
		{"bad port of a flow", []string{"flows", "--port", "65536"}, 1, "", "--port 65536 is not between"},
		{"no directory", []string{"explain", "--from", "a", "--to", "b", "--port", "80", "--policy-dir", "/nonexistent"}, 1, "", "policy directory: open /nonexistent: no such file"},
		{"nothing pinned", append(nowhere, "status"), 1, "", `Run "podgate init"`},
		{"nothing pinned to explain", append(nowhere, "explain", "--from", "a", "--to", "b", "--port", "80"), 1, "", `Run "podgate init"`},
		{"gc without keep", append(nowhere, "gc", "--network", "n"), 1, "", "--all"},
		{"gc with a bad keep", append(nowhere, "gc", "--network", "n", "--keep", "c0ffee"), 1, "", `--keep "c0ffee" is not like CONTAINER/IFNAME`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			code, stdout, stderr := command(t, tt.args...)
			if code != tt.code || !strings.Contains(stdout, tt.stdout) || !strings.Contains(stderr, tt.stderr) {
				t.Errorf("exit code %d, want %d\n%s\n%s", code, tt.code, stdout, stderr)
			}
		})
	}
}

// TestDirectoryAlone asks about manifests that nothing runs.
func TestDirectoryAlone(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("pods.yaml", podManifests)
	write("web.yaml", allowClient)
	root := os.Getuid() == 0

	code, stdout, stderr := command(t, "explain", "--from", "shop/client", "--to", "shop/web", "--port", "80", "--policy-dir", dir)
	if code != 0 || !strings.HasPrefix(stdout, "ALLOW  shop/client -> shop/web on 80/TCP\n") ||
		!strings.Contains(stdout, "note: shop/client has no address in its manifest; 198.18.0.1 is assumed") {
		t.Errorf("exit code %d\n%s%s", code, stdout, stderr)
	}
	if root != strings.Contains(stdout, "compiler and kernel agree") || root == strings.Contains(stdout, "note: only the compiler answered; run it as root") {
		t.Errorf("as root: %v\n%s", root, stdout)
	}
	code, stdout, stderr = command(t, "matrix", "--ports", "80", "--address", "1.1.1.1", "--policy-dir", dir)
	want := strings.Join([]string{
		"80/TCP       shop/client  shop/web  1.1.1.1",
		"shop/client  allow        allow     allow",
		"shop/web     allow        allow     allow",
		"1.1.1.1      allow        deny      -",
		"",
		"rows connect to columns; about the manifests in " + dir,
	}, "\n")
	if code != 0 || !strings.HasPrefix(stdout, want) {
		t.Errorf("exit code %d\n%s%s", code, stdout, stderr)
	}

	write("web.yaml", "nonsense: [")
	code, stdout, _ = command(t, "matrix", "--ports", "80", "--policy-dir", dir)
	if code != 2 || !strings.Contains(stdout, "NOTHING in this file is enforced") {
		t.Errorf("with a broken file: exit code %d\n%s", code, stdout)
	}
	code, _, stderr = command(t, "explain", "--from", "shop/nobody", "--to", "shop/web", "--port", "80", "--policy-dir", dir)
	if code != 1 || !strings.Contains(stderr, "no such pod: shop/nobody; known are shop/client, shop/web") {
		t.Errorf("unknown pod: exit code %d\n%s", code, stderr)
	}
}
