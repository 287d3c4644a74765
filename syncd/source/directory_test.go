// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package source

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// namespace is a manifest of a namespace, optionally with a label.
func namespace(name, label string) string {
	return fmt.Sprintf("apiVersion: v1\nkind: Namespace\nmetadata: {name: %s, labels: {l: %q}}\n", name, label)
}

func networkPolicy(name, spec string) string {
	return fmt.Sprintf("apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: %s, namespace: shop}\nspec: %s\n", name, spec)
}

// write replaces a file the way careful tools do.
func write(t *testing.T, path, data string) {
	t.Helper()
	if err := os.WriteFile(path+".tmp", []byte(data), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".tmp", path); err != nil {
		t.Fatal(err)
	}
}

func remove(t *testing.T, path string) {
	t.Helper()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
}

func load(t *testing.T, d *Directory) Batch {
	t.Helper()
	batch, err := d.Load(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return batch
}

// describe is a batch as sorted lines: +set, -gone, !problem.
func describe(b Batch) []string {
	var out []string
	for _, o := range b.Set {
		out = append(out, "+"+o.String())
	}
	for _, k := range b.Gone {
		out = append(out, "-"+k.String())
	}
	for _, p := range b.Problems {
		out = append(out, "!"+p.Reason)
	}
	slices.Sort(out)
	return out
}

func expect(t *testing.T, b Batch, want ...string) {
	t.Helper()
	got := describe(b)
	ok := len(got) == len(want)
	for i := 0; ok && i < len(want); i++ {
		ok = strings.Contains(got[i], want[i])
	}
	if !ok {
		t.Fatalf("got %q, want %q", got, want)
	}
}

func TestDirectoryLoad(t *testing.T) {
	dir := t.TempDir()
	d := NewDirectory(DirectoryOptions{Path: dir})
	expect(t, load(t, d))

	write(t, filepath.Join(dir, "a.yaml"), namespace("a", "")+"---\n"+namespace("b", ""))
	write(t, filepath.Join(dir, "b.json"), `{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "c"}}`)
	write(t, filepath.Join(dir, "README.md"), "no manifest")
	write(t, filepath.Join(dir, ".hidden.yaml"), "broken: [")
	if err := os.Mkdir(filepath.Join(dir, "dir.yaml"), 0o700); err != nil {
		t.Fatal(err)
	}
	expect(t, load(t, d), "+Namespace a", "+Namespace b", "+Namespace c")
	expect(t, load(t, d))

	write(t, filepath.Join(dir, "a.yaml"), "# moved down\n"+namespace("a", "")+"---\n"+namespace("b", "new"))
	expect(t, load(t, d), "+Namespace b")

	remove(t, filepath.Join(dir, "a.yaml"))
	expect(t, load(t, d), "-Namespace a", "-Namespace b")
}

func TestDirectoryMissing(t *testing.T) {
	d := NewDirectory(DirectoryOptions{Path: filepath.Join(t.TempDir(), "none")})
	if _, err := d.Load(t.Context()); err == nil || !strings.Contains(err.Error(), "none") {
		t.Errorf("Load: %v", err)
	}
	if err := d.Run(t.Context(), func(Batch) { t.Error("a batch of nothing") }); err == nil {
		t.Error("Run: no error")
	}
}

func TestDirectoryBrokenFile(t *testing.T) {
	for name, tt := range map[string]struct {
		breakIt func(t *testing.T, path string)
		want    string
	}{
		"syntax": {func(t *testing.T, path string) { write(t, path, "a: [") }, "a.yaml:1: "},
		"invalid": {func(t *testing.T, path string) {
			write(t, path, networkPolicy("web", "{podSelector: {}, ingress: [{from: [{}]}]}"))
		}, "a.yaml:4: NetworkPolicy shop/web: spec.ingress[0].from[0]: Required value"},
		"truncated": {func(t *testing.T, path string) { write(t, path, "\n") }, "a.yaml:1: the file is empty"},
		"dangling": {func(t *testing.T, path string) {
			remove(t, path)
			if err := os.Symlink("nowhere", path); err != nil {
				t.Fatal(err)
			}
		}, "no such file"},
		"device": {func(t *testing.T, path string) {
			remove(t, path)
			if err := os.Symlink("/dev/zero", path); err != nil {
				t.Fatal(err)
			}
		}, "not a regular file"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "a.yaml")
			opts := DirectoryOptions{Path: dir, Cache: t.TempDir()}
			good := networkPolicy("web", "{podSelector: {}}")
			write(t, path, good)
			write(t, filepath.Join(dir, "b.yaml"), namespace("b", ""))
			d := NewDirectory(opts)
			expect(t, load(t, d), "+Namespace b", "+NetworkPolicy shop/web")

			tt.breakIt(t, path)
			batch := load(t, d)
			expect(t, batch, "!")
			if p := batch.Problems[0]; p.Subject != path || !strings.Contains(p.Reason, tt.want) ||
				!strings.HasSuffix(p.Reason, "its last good version stays in force (1 objects)") || p.Since.IsZero() {
				t.Errorf("problem %+v, want %q", p, tt.want)
			}
			if again := load(t, d); !slices.Equal(again.Problems, batch.Problems) {
				t.Errorf("problems %v, then %v", batch.Problems, again.Problems)
			}

			// The other files go on, and so does the broken one in the next process.
			write(t, filepath.Join(dir, "b.yaml"), namespace("c", ""))
			expect(t, load(t, d), "!", "+Namespace c", "-Namespace b")
			expect(t, load(t, NewDirectory(opts)), "!", "+Namespace c", "+NetworkPolicy shop/web")

			remove(t, path)
			expect(t, load(t, d), "-NetworkPolicy shop/web")
			write(t, path, "a: [")
			expect(t, load(t, d), "!")
			expect(t, load(t, NewDirectory(opts)), "!", "+Namespace c")
			write(t, path, good)
			expect(t, load(t, d), "+NetworkPolicy shop/web")
		})
	}
}

func TestDirectoryBrokenFromTheStart(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "a.yaml"), "apiVersion: apps/v1\nkind: Deployment\n")
	batch := load(t, NewDirectory(DirectoryOptions{Path: dir, Cache: t.TempDir()}))
	expect(t, batch, "!")
	if !strings.Contains(batch.Problems[0].Reason, "NOTHING in this file is enforced") {
		t.Errorf("problem %q", batch.Problems[0].Reason)
	}
}

// TestDirectoryCacheOfRemovedFile asks that what was removed while no process
// watched does not come back with a broken file of the same name.
func TestDirectoryCacheOfRemovedFile(t *testing.T) {
	dir := t.TempDir()
	opts := DirectoryOptions{Path: dir, Cache: t.TempDir()}
	path := filepath.Join(dir, "a.yaml")
	write(t, path, namespace("a", ""))
	load(t, NewDirectory(opts))
	remove(t, path)
	load(t, NewDirectory(opts))
	write(t, path, "a: [")
	expect(t, load(t, NewDirectory(opts)), "!")

	other := opts
	other.Path = t.TempDir()
	write(t, path, namespace("a", ""))
	load(t, NewDirectory(opts))
	write(t, filepath.Join(other.Path, "a.yaml"), "a: [")
	expect(t, load(t, NewDirectory(other)), "!")
}

func TestDirectoryConflicts(t *testing.T) {
	dir := t.TempDir()
	a, b := filepath.Join(dir, "a.yaml"), filepath.Join(dir, "b.yaml")
	write(t, b, namespace("x", "b"))
	d := NewDirectory(DirectoryOptions{Path: dir})
	expect(t, load(t, d), "+Namespace x")

	write(t, a, "# first\n"+namespace("x", "a"))
	batch := load(t, d)
	expect(t, batch, "!"+b+":1: Namespace x is defined already in "+a+":2; that one counts", "+Namespace x")
	if got := batch.Set[0].Namespace.Labels["l"]; got != "a" {
		t.Errorf("definition %q counts", got)
	}
	remove(t, a)
	batch = load(t, d)
	expect(t, batch, "+Namespace x")
	if got := batch.Set[0].Namespace.Labels["l"]; got != "b" {
		t.Errorf("definition %q counts", got)
	}

	pod := func(name string) string {
		return "apiVersion: v1\nkind: Pod\nmetadata: {name: " + name + ", uid: u}\n"
	}
	write(t, a, pod("p")+"---\n"+pod("q"))
	expect(t, load(t, d), "!"+a+":5: Pod default/q has the UID of Pod default/p, already in "+a+":1; that one counts", "+Pod default/p")
}

// runner collects what Run delivers.
type runner struct {
	t       *testing.T
	batches chan Batch
}

func run(t *testing.T, opts DirectoryOptions) *runner {
	t.Helper()
	opts.Settle = 20 * time.Millisecond
	if opts.Rescan == 0 {
		opts.Rescan = time.Hour
	}
	r := &runner{t: t, batches: make(chan Batch, 100)}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- NewDirectory(opts).Run(ctx, func(b Batch) { r.batches <- b }) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return r
}

// until sums up batches until their sum is as wanted.
func (r *runner) until(sum map[string]string, want map[string]string) Batch {
	r.t.Helper()
	timeout := time.After(20 * time.Second)
	for {
		select {
		case b := <-r.batches:
			for _, o := range b.Set {
				if o.Namespace != nil {
					sum[o.Name] = o.Namespace.Labels["l"]
				} else {
					sum[o.Name] = o.Kind
				}
			}
			for _, k := range b.Gone {
				delete(sum, k.Name)
			}
			if maps.Equal(sum, want) {
				return b
			}
		case <-timeout:
			r.t.Fatalf("state %v, want %v", sum, want)
		}
	}
}

func TestDirectoryRun(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "a.yaml")
	write(t, path, namespace("a", "1"))
	r, sum := run(t, DirectoryOptions{Path: dir}), map[string]string{}
	r.until(sum, map[string]string{"a": "1"})
	write(t, path, namespace("a", "2"))
	r.until(sum, map[string]string{"a": "2"})
	if err := os.WriteFile(path, []byte(namespace("a", "in-place")), 0o600); err != nil {
		t.Fatal(err)
	}
	r.until(sum, map[string]string{"a": "in-place"})
	write(t, filepath.Join(dir, "b.yaml"), namespace("b", "1"))
	r.until(sum, map[string]string{"a": "in-place", "b": "1"})
	write(t, path, "a: [")
	if b := r.until(sum, map[string]string{"a": "in-place", "b": "1"}); len(b.Problems) != 1 {
		t.Errorf("problems %v", b.Problems)
	}
	remove(t, path)
	if b := r.until(sum, map[string]string{"b": "1"}); len(b.Problems) != 0 {
		t.Errorf("problems %v", b.Problems)
	}
}

// TestDirectoryRunConfigMap changes a directory as the kubelet changes a
// ConfigMap volume.
func TestDirectoryRunConfigMap(t *testing.T) {
	dir := t.TempDir()
	publish := func(version string, files map[string]string) {
		t.Helper()
		if err := os.Mkdir(filepath.Join(dir, version), 0o700); err != nil {
			t.Fatal(err)
		}
		for name, data := range files {
			write(t, filepath.Join(dir, version, name), data)
		}
		if err := os.Symlink(version, filepath.Join(dir, "..data_tmp")); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(filepath.Join(dir, "..data_tmp"), filepath.Join(dir, "..data")); err != nil {
			t.Fatal(err)
		}
	}
	link := func(name string) {
		t.Helper()
		if err := os.Symlink(filepath.Join("..data", name), filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	publish("..2026_1", map[string]string{"a.yaml": namespace("a", "1"), "b.yaml": namespace("b", "1")})
	link("a.yaml")
	link("b.yaml")
	r, sum := run(t, DirectoryOptions{Path: dir}), map[string]string{}
	r.until(sum, map[string]string{"a": "1", "b": "1"})

	publish("..2026_2", map[string]string{"a.yaml": namespace("a", "2"), "b.yaml": namespace("b", "2")})
	if err := os.RemoveAll(filepath.Join(dir, "..2026_1")); err != nil {
		t.Fatal(err)
	}
	r.until(sum, map[string]string{"a": "2", "b": "2"})

	publish("..2026_3", map[string]string{"a.yaml": namespace("a", "3"), "c.yaml": namespace("c", "3")})
	link("c.yaml")
	remove(t, filepath.Join(dir, "b.yaml"))
	r.until(sum, map[string]string{"a": "3", "c": "3"})
}

// TestDirectoryRunLinks changes what symbolic links lead to: the directory
// itself and a file elsewhere.
func TestDirectoryRunLinks(t *testing.T) {
	base := t.TempDir()
	for _, v := range []string{"v1", "v2", "far"} {
		if err := os.Mkdir(filepath.Join(base, v), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	far := filepath.Join(base, "far", "f.yaml")
	write(t, far, namespace("f", "1"))
	for _, v := range []string{"v1", "v2"} {
		write(t, filepath.Join(base, v, "a.yaml"), namespace("a", v))
		if err := os.Symlink(far, filepath.Join(base, v, "f.yaml")); err != nil {
			t.Fatal(err)
		}
	}
	current := filepath.Join(base, "current")
	swap := func(to string) {
		t.Helper()
		if err := os.Symlink(to, current+".tmp"); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(current+".tmp", current); err != nil {
			t.Fatal(err)
		}
	}
	swap("v1")
	r, sum := run(t, DirectoryOptions{Path: current}), map[string]string{}
	r.until(sum, map[string]string{"a": "v1", "f": "1"})
	swap("v2")
	r.until(sum, map[string]string{"a": "v2", "f": "1"})
	write(t, filepath.Join(base, "v2", "a.yaml"), namespace("a", "after"))
	r.until(sum, map[string]string{"a": "after", "f": "1"})
	write(t, far, namespace("f", "2"))
	r.until(sum, map[string]string{"a": "after", "f": "2"})
}

func TestDirectoryRunVanishes(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "policies")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "a.yaml")
	write(t, path, namespace("a", "1"))
	r, sum := run(t, DirectoryOptions{Path: dir}), map[string]string{}
	r.until(sum, map[string]string{"a": "1"})
	if err := os.Rename(dir, dir+".away"); err != nil {
		t.Fatal(err)
	}
	b := r.until(sum, map[string]string{"a": "1"})
	if len(b.Problems) != 1 || !strings.Contains(b.Problems[0].Reason, "stays in force") {
		t.Errorf("problems %v", b.Problems)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	write(t, path, namespace("a", "2"))
	r.until(sum, map[string]string{"a": "2"})
}

// TestDirectoryRunRescan relies on nothing but the rescan: the file lies on a
// path that a symbolic link in the middle leads to, which nobody watches.
func TestDirectoryRunRescan(t *testing.T) {
	base, dir := t.TempDir(), t.TempDir()
	for _, v := range []string{"v1", "v2"} {
		if err := os.MkdirAll(filepath.Join(base, "deep", v), 0o700); err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(base, "deep", v, "a.yaml"), namespace("a", v))
	}
	link := filepath.Join(base, "deep", "current")
	if err := os.Symlink("v1", link); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(link, "a.yaml"), filepath.Join(dir, "a.yaml")); err != nil {
		t.Fatal(err)
	}
	r, sum := run(t, DirectoryOptions{Path: dir, Rescan: 50 * time.Millisecond}), map[string]string{}
	r.until(sum, map[string]string{"a": "v1"})
	remove(t, link)
	if err := os.Symlink("v2", link); err != nil {
		t.Fatal(err)
	}
	r.until(sum, map[string]string{"a": "v2"})
}

var _ Source = (*Directory)(nil)
