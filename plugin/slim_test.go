// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// A runtime starts the plugin anew for each verb of each pod: what it links is
// what every pod waits for.
func TestPluginIsSlim(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	heavy := []string{
		"k8s.io/", "sigs.k8s.io/", "google.golang.org/grpc", "github.com/prometheus/", "github.com/spf13/", "go.opentelemetry.io/", "net/http", "crypto/tls",
	}
	for dep := range strings.Lines(string(out)) {
		for _, h := range heavy {
			if strings.HasPrefix(dep, h) {
				t.Errorf("plugin links %s", strings.TrimSpace(dep))
			}
		}
	}

	const most = 6 << 20
	binary := filepath.Join(t.TempDir(), "podgate-cni")
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", binary, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	info, err := os.Stat(binary)
	if err != nil {
		t.Fatal(err)
	}
	if info.Size() > most {
		t.Errorf("plugin has %d bytes, want at most %d", info.Size(), most)
	}
}
