// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

// Package build makes the programs and images of a Kubernetes cluster from Go
// modules, into a cache: half an hour of work once, none as long as versions
// stay. Nothing is pulled from a registry of images.
//
// Each directory below is a module of its own, because what Kubernetes,
// containerd, etcd and CoreDNS require does not go together.
package build

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// ErrStale is what [Cache.Check] returns when something is not built, or is
// built from another version.
var ErrStale = errors.New("not built")

// group is what one module of this directory gives.
type group struct {
	name   string
	module string
	tags   string
	// flags for the linker, with {version} for the version of versionOf.
	linker    string
	versionOf string
	programs  []program
	// links are other names of the first program.
	links []string
}

// program is one package, and the name of its binary.
type program struct {
	name, pkg string
	test      bool
}

const (
	kubernetes = "k8s.io/kubernetes"
	containerd = "github.com/containerd/containerd/v2"
)

func groups() []group {
	return []group{{
		name:   "kubernetes",
		module: "kubernetes",
		linker: "-X k8s.io/component-base/version.gitVersion={version}" +
			" -X k8s.io/client-go/pkg/version.gitVersion={version}",
		versionOf: kubernetes,
		programs: []program{
			{name: "kubernetes", pkg: "./node"},
			{name: "images", pkg: "./images"},
			{name: "agnhost", pkg: kubernetes + "/test/images/agnhost"},
		},
		links: []string{"kube-apiserver", "kube-controller-manager", "kube-scheduler", "kube-proxy", "kubelet", "kubectl"},
	}, {
		name:     "etcd",
		module:   "etcd",
		programs: []program{{name: "etcd", pkg: "go.etcd.io/etcd/server/v3"}},
	}, {
		name:      "containerd",
		module:    "containerd",
		tags:      "no_btrfs,no_devmapper,no_zfs",
		linker:    "-X " + containerd + "/version.Version={version}",
		versionOf: containerd,
		programs: []program{
			{name: "containerd", pkg: containerd + "/cmd/containerd"},
			{name: "containerd-shim-runc-v2", pkg: containerd + "/cmd/containerd-shim-runc-v2"},
			{name: "ctr", pkg: containerd + "/cmd/ctr"},
		},
	}, {
		name:     "coredns",
		module:   "coredns",
		programs: []program{{name: "coredns", pkg: "."}},
	}, {
		name:     "pause",
		module:   "..",
		programs: []program{{name: "pause", pkg: "./build/pause"}},
	}, {
		name:     "e2e",
		module:   "kubernetes",
		programs: []program{{name: "e2e.test", pkg: "./e2e", test: true}},
	}}
}

// Cache is a directory of what was built.
type Cache struct {
	dir    string
	source string
	log    *slog.Logger
}

// Open returns the cache that the environment variable PODGATE_E2E_CACHE names,
// or podgate/e2e in the user's cache directory. source is this package's
// directory: the modules to build are in it.
func Open(source string, log *slog.Logger) (*Cache, error) {
	source, err := filepath.Abs(source)
	if err != nil {
		return nil, err
	}
	dir := os.Getenv("PODGATE_E2E_CACHE")
	if dir == "" {
		user, err := os.UserCacheDir()
		if err != nil {
			return nil, err
		}
		dir = filepath.Join(user, "podgate", "e2e")
	}
	if dir, err = filepath.Abs(dir); err != nil {
		return nil, err
	}
	return &Cache{dir: dir, source: source, log: log}, nil
}

// Bin is the directory of the programs.
func (c *Cache) Bin() string { return filepath.Join(c.dir, "bin") }

// Images are the tarballs to import into a container runtime.
func (c *Cache) Images() []string {
	var files []string
	for _, name := range imageNames() {
		files = append(files, c.imageFile(name))
	}
	return files
}

func (c *Cache) imageFile(name string) string { return filepath.Join(c.dir, "images", name+".tar") }

func (c *Cache) stampFile(name string) string { return filepath.Join(c.dir, "stamps", name) }

// Check returns nil if all is built as [Cache.Build] would, and otherwise
// [ErrStale] with the names of what is not.
func (c *Cache) Check() error {
	var stale []string
	for _, g := range groups() {
		fresh, _, err := c.fresh(g)
		if err != nil {
			return err
		}
		if !fresh {
			stale = append(stale, g.name)
		}
	}
	for _, name := range imageNames() {
		if _, err := os.Stat(c.imageFile(name)); err != nil {
			stale = append(stale, "image of "+name)
		}
	}
	if len(stale) > 0 {
		return fmt.Errorf("%w in %s: %s", ErrStale, c.dir, strings.Join(stale, ", "))
	}
	return nil
}

// Build makes what is not up to date.
func (c *Cache) Build(ctx context.Context) error {
	for _, dir := range []string{"bin", "images", "stamps"} {
		if err := os.MkdirAll(filepath.Join(c.dir, dir), 0o755); err != nil {
			return err
		}
	}
	unlock, err := c.lock()
	if err != nil {
		return err
	}
	defer unlock()
	for _, g := range groups() {
		if err := c.group(ctx, g); err != nil {
			return fmt.Errorf("build %s: %w", g.name, err)
		}
	}
	return c.images(ctx)
}

// lock keeps builds that run side by side apart.
func (c *Cache) lock() (unlock func(), err error) {
	f, err := os.Open(c.dir)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", c.dir, err)
	}
	return func() { f.Close() }, nil
}

func (c *Cache) group(ctx context.Context, g group) error {
	fresh, stamp, err := c.fresh(g)
	if err != nil || fresh {
		return err
	}
	c.log.Info("building", "what", g.name)
	start := time.Now()
	if err := os.Remove(c.stampFile(g.name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	linker := "-s -w"
	if g.linker != "" {
		version, err := c.goCommand(ctx, g, "list", "-m", "-f", "{{.Version}}", g.versionOf)
		if err != nil {
			return err
		}
		linker += " " + strings.ReplaceAll(g.linker, "{version}", strings.TrimSpace(version))
	}
	for _, p := range g.programs {
		verb := []string{"build"}
		if p.test {
			verb = []string{"test", "-c"}
		}
		// A running cluster keeps the old file.
		temp := filepath.Join(c.Bin(), "."+p.name)
		args := append(verb, "-trimpath", "-buildvcs=false", "-tags", g.tags, "-ldflags", linker, "-o", temp, p.pkg)
		if _, err := c.goCommand(ctx, g, args...); err != nil {
			return err
		}
		if err := os.Rename(temp, filepath.Join(c.Bin(), p.name)); err != nil {
			return err
		}
	}
	for _, link := range g.links {
		link = filepath.Join(c.Bin(), link)
		if err := os.Remove(link); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err := os.Symlink(g.programs[0].name, link); err != nil {
			return err
		}
	}
	c.log.Info("built", "what", g.name, "took", time.Since(start).Round(time.Second))
	return os.WriteFile(c.stampFile(g.name), []byte(stamp), 0o644)
}

// goCommand runs go in the group's module with the least priority: it may take
// a long time next to somebody's work.
func (c *Cache) goCommand(ctx context.Context, g group, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "nice", append([]string{"-n", "19", "go"}, args...)...)
	cmd.Dir = filepath.Join(c.source, g.module)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("go %s: %w\n%s", strings.Join(args, " "), err, stderr.String())
	}
	return string(out), nil
}

// fresh tells whether a group is built from what its module is now, and the
// stamp of that.
func (c *Cache) fresh(g group) (fresh bool, stamp string, err error) {
	stamp, err = c.stamp(g)
	if err != nil {
		return false, "", err
	}
	old, err := os.ReadFile(c.stampFile(g.name))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, "", err
	}
	if string(old) != stamp {
		return false, stamp, nil
	}
	for _, p := range g.programs {
		if _, err := os.Stat(filepath.Join(c.Bin(), p.name)); err != nil {
			return false, stamp, nil
		}
	}
	return true, stamp, nil
}

// stamp is a digest of all that decides what is built: the module's versions
// and source files, the flags and the version of Go.
func (c *Cache) stamp(g group) (string, error) {
	dir := filepath.Join(c.source, g.module)
	var files []string
	if g.module == ".." { // of our own module only what the program is made of
		for _, p := range g.programs {
			sources, err := filepath.Glob(filepath.Join(dir, p.pkg, "*.go"))
			if err != nil {
				return "", err
			}
			files = append(files, sources...)
		}
	} else {
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err == nil && !d.IsDir() {
				files = append(files, path)
			}
			return err
		})
		if err != nil {
			return "", err
		}
	}
	slices.Sort(files)
	text := fmt.Sprintf("%s %s %+v\n", runtime.Version(), runtime.GOARCH, g)
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			return "", err
		}
		text += fmt.Sprintf("%s %x\n", filepath.Base(f), sha256.Sum256(b))
	}
	return fmt.Sprintf("%x", sha256.Sum256([]byte(text))), nil
}
