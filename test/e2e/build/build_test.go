// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package build

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// TestCache: what is built is fresh until its module changes or a program goes.
func TestCache(t *testing.T) {
	source := t.TempDir()
	t.Setenv("PODGATE_E2E_CACHE", t.TempDir())
	cache, err := Open(source, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	g := group{name: "hello", module: "hello", programs: []program{{name: "hello", pkg: "."}}, links: []string{"hi"}}
	write := func(name, content string) {
		t.Helper()
		path := filepath.Join(source, "hello", name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(content), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	fresh := func(want bool) {
		t.Helper()
		got, _, err := cache.fresh(g)
		if err != nil || got != want {
			t.Fatalf("fresh: %t, %v, want %t", got, err, want)
		}
	}
	write("go.mod", "module hello\n\ngo 1.26.0\n")
	write("main.go", "package main\n\nfunc main() { println(1) }\n")
	for _, dir := range []string{cache.Bin(), filepath.Dir(cache.stampFile("hello"))} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	fresh(false)
	if err := cache.group(t.Context(), g); err != nil {
		t.Fatal(err)
	}
	fresh(true)
	if _, err := os.Stat(filepath.Join(cache.Bin(), "hi")); err != nil {
		t.Error(err)
	}
	write("main.go", "package main\n\nfunc main() { println(2) }\n")
	fresh(false)
	if err := cache.group(t.Context(), g); err != nil {
		t.Fatal(err)
	}
	fresh(true)
	if err := os.Remove(filepath.Join(cache.Bin(), "hello")); err != nil {
		t.Fatal(err)
	}
	fresh(false)

	write("main.go", "package main\n\nfunc main() { no such thing }\n")
	if err := cache.group(t.Context(), g); err == nil || !strings.Contains(err.Error(), "main.go:3") {
		t.Errorf("a program that does not compile: %v", err)
	}
	fresh(false)
}

func TestCheckNamesWhatIsMissing(t *testing.T) {
	t.Setenv("PODGATE_E2E_CACHE", t.TempDir())
	cache, err := Open(".", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	err = cache.Check()
	if !errors.Is(err, ErrStale) {
		t.Fatalf("check of an empty cache: %v", err)
	}
	for _, g := range groups() {
		if !strings.Contains(err.Error(), g.name) {
			t.Errorf("%q does not name %s", err, g.name)
		}
	}
}

func TestImage(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("PODGATE_E2E_CACHE", dir)
	cache, err := Open(".", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	for _, sub := range []string{"images", "stamps"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	tool := filepath.Join(dir, "tool")
	if err := os.WriteFile(tool, []byte("#!"), 0o600); err != nil {
		t.Fatal(err)
	}
	err = cache.image("test", image{
		tags: []string{"e2e.podgate.test/a:1", "e2e.podgate.test/b:2"}, entrypoint: []string{"/bin/tool"},
		files: map[string]string{"/bin/tool": tool}, texts: map[string]string{"/etc/x": "y"},
		links: map[string]string{"/bin/same": "tool"},
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, tag := range []string{"e2e.podgate.test/a:1", "e2e.podgate.test/b:2"} {
		ref, err := name.NewTag(tag)
		if err != nil {
			t.Fatal(err)
		}
		built, err := tarball.ImageFromPath(cache.imageFile("test"), &ref)
		if err != nil {
			t.Fatalf("%s: %v", tag, err)
		}
		config, err := built.ConfigFile()
		if err != nil || len(config.Config.Entrypoint) != 1 || config.Config.Entrypoint[0] != "/bin/tool" {
			t.Errorf("%s: %+v, %v", tag, config, err)
		}
		layers, err := built.Layers()
		if err != nil || len(layers) != 1 {
			t.Fatalf("%s: %d layers, %v", tag, len(layers), err)
		}
		content, err := layers[0].Uncompressed()
		if err != nil {
			t.Fatal(err)
		}
		checkFiles(t, content)
	}
}

func checkFiles(t *testing.T, archive io.Reader) {
	t.Helper()
	b, err := io.ReadAll(archive)
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]string{}
	r := tar.NewReader(bytes.NewReader(b))
	for {
		header, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		text, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		found[header.Name] = string(text) + header.Linkname
	}
	for path, want := range map[string]string{"bin/tool": "#!", "etc/x": "y", "bin/same": "tool"} {
		if found[path] != want {
			t.Errorf("%s is %q, want %q", path, found[path], want)
		}
	}
}
