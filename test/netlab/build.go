// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package netlab

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// referencePlugins are tools of this module: go.mod says which version.
var referencePlugins = []string{
	"github.com/containernetworking/plugins/plugins/ipam/dhcp",
	"github.com/containernetworking/plugins/plugins/ipam/host-local",
	"github.com/containernetworking/plugins/plugins/ipam/static",
	"github.com/containernetworking/plugins/plugins/main/bridge",
	"github.com/containernetworking/plugins/plugins/main/loopback",
	"github.com/containernetworking/plugins/plugins/main/macvlan",
	"github.com/containernetworking/plugins/plugins/main/ptp",
	"github.com/containernetworking/plugins/plugins/meta/bandwidth",
	"github.com/containernetworking/plugins/plugins/meta/firewall",
	"github.com/containernetworking/plugins/plugins/meta/portmap",
	"github.com/containernetworking/plugins/plugins/meta/tuning",
}

const pluginPackage = "github.com/podgate/podgate/plugin"

// Build fills dir, which must exist, like a node's /opt/cni/bin: with
// podgate-cni and podgate-ipam of this source tree, linked as for a release,
// and with the reference plugins. Those do not change from run to run: they
// are linked once into the user's cache directory, and dir gets symbolic
// links. The current directory must be in this module.
//
// Where there is no Go, the environment variable NETLAB_PLUGINS names a
// directory that Build filled elsewhere.
func Build(ctx context.Context, dir string) error {
	if built := os.Getenv("NETLAB_PLUGINS"); built != "" {
		return linkAll(built, dir)
	}
	if err := BuildReference(ctx, dir); err != nil {
		return err
	}
	cni := filepath.Join(dir, "podgate-cni")
	if err := goBuild(ctx, cni, pluginPackage); err != nil {
		return err
	}
	return os.Link(cni, filepath.Join(dir, "podgate-ipam"))
}

// BuildReference is [Build] without podgate's own plugins.
func BuildReference(ctx context.Context, dir string) error {
	cache, err := os.UserCacheDir()
	if err != nil {
		return err
	}
	cache = filepath.Join(cache, "podgate", "reference-plugins")
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return err
	}
	unlock, err := lockDir(cache)
	if err != nil {
		return err
	}
	defer unlock()
	if err := goBuild(ctx, cache+"/", referencePlugins...); err != nil {
		return err
	}
	for _, p := range referencePlugins {
		name := path.Base(p)
		if err := os.Symlink(filepath.Join(cache, name), filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	return nil
}

// linkAll makes symbolic links in dir to what is in another directory.
func linkAll(from, dir string) error {
	entries, err := os.ReadDir(from)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := os.Symlink(filepath.Join(from, e.Name()), filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	return nil
}

// goBuild relinks only what is out of date.
func goBuild(ctx context.Context, out string, packages ...string) error {
	args := append([]string{"build", "-trimpath", "-ldflags", "-s -w", "-o", out}, packages...)
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if output, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("netlab: go build %v: %w\n%s", packages, err, output)
	}
	return nil
}

// lockDir keeps test binaries that run side by side from building into the
// same directory at once.
func lockDir(dir string) (unlock func(), err error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		f.Close()
		return nil, fmt.Errorf("netlab: lock %s: %w", dir, err)
	}
	return func() { f.Close() }, nil
}
