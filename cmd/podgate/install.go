// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/podgate/podgate/install"
	"github.com/podgate/podgate/pinning"
	"github.com/podgate/podgate/syncd/apiserver"
)

// installFlags are those of install and uninstall.
type installFlags struct {
	options  install.Options
	entry    string
	capacity pinning.Capacity
	systemd  string
	unit     install.Unit
	wait     time.Duration
	// of --watch
	probes, daemonSet, kubeconfig string
}

// The values of --systemd.
const (
	systemdAuto = "auto"
	systemdOn   = "on"
	systemdOff  = "off"
)

func (a *app) installCommand() *cobra.Command {
	var f installFlags
	watch := false
	cmd := &cobra.Command{
		Use:   "install",
		Short: "Put podgate on this node, for a container runtime without Kubernetes",
		Long: `Copies the binaries, sets up the pinned state, starts the daemon as a systemd
unit where systemd runs, and at last puts podgate-cni into the network
configuration that the runtime takes: the first by name that can be loaded, or
what multus delegates to.

All that is in that file stays as it is. Everything done is recorded, so that
"podgate uninstall" leaves the node as it was. Done again it upgrades, or
completes what was interrupted.

Containers that run stay as they are, without a gate, until "podgate adopt"
gates them or they are started again.

With --watch it stays: it waits for a network that comes later, puts the entry
back when the owner of the network writes it anew, and gates what was started
without it, once the daemon knows policy. If somebody takes the entry out again and again it says so, and puts
it back ever more seldom.`,
		Example: `  podgate install
  podgate install --bin-dir /usr/lib/cni --options '{"mode": "open"}'
  podgate install --conflist /etc/cni/net.d/nerdctl-bridge.conflist --dry-run`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			o, err := a.installOptions(f)
			if err != nil {
				return err
			}
			if f.options.Source == "" {
				self, err := os.Executable()
				if err != nil {
					return fmt.Errorf("--from: %w", err)
				}
				if self, err = filepath.EvalSymlinks(self); err != nil {
					return fmt.Errorf("--from: %w", err)
				}
				o.Source = filepath.Dir(self)
			}
			if watch {
				return a.watch(cmd, &f, o)
			}
			var done changes
			o.Step = done.step
			ctx, cancel := context.WithTimeout(cmd.Context(), f.wait)
			defer cancel()
			err = install.Install(ctx, o)
			return errors.Join(err, a.print(done, done.text))
		},
	}
	flags := cmd.Flags()
	f.shared(flags)
	flags.StringVar(&f.options.Conflist, "conflist", "", "network configuration to change (default the one of --conf-dir that a runtime takes)")
	flags.StringVar(&f.options.Source, "from", "", "directory with podgate-cni and podgate (default where this podgate is)")
	flags.StringVar(&f.unit.PolicyDir, "policy-dir", "/etc/podgate/policy.d", "directory of manifests for the systemd unit")
	flags.StringVar(&f.entry, "options", "", "further keys of podgate-cni's object, as a JSON object")
	flags.BoolVar(&watch, "watch", false, "stay, and keep podgate part of the network")
	flags.StringVar(&f.probes, "probes", "", "with --watch: address to serve /healthz and /readyz on, such as 127.0.0.1:9967 (default none)")
	flags.StringVar(&f.daemonSet, "uninstall-with", "", "with --watch: uninstall at the end if this DaemonSet, NAMESPACE/NAME, has been deleted")
	flags.StringVar(&f.kubeconfig, "kubeconfig", apiserver.InCluster, "with --uninstall-with: kubeconfig of the cluster, or "+apiserver.InCluster)
	f.settle(flags)
	capacityFlags(flags, &f.capacity)
	cmd.MarkFlagsMutuallyExclusive("watch", "dry-run")
	complete(cmd, "systemd", systemdAuto, systemdOn, systemdOff)
	return cmd
}

func (f *installFlags) shared(flags *pflag.FlagSet) {
	o := &f.options
	flags.StringVar(&o.ConfDir, "conf-dir", "/etc/cni/net.d", "directory of network configurations")
	flags.StringVar(&o.BinDir, "bin-dir", "/opt/cni/bin", "directory of CNI plugins")
	flags.StringVar(&o.CommandDir, "command-dir", "/usr/local/bin", "directory for podgate itself; empty leaves it where it is")
	flags.StringVar(&o.StateDir, "state-dir", "/var/lib/podgate", "directory of the record of what was done")
	flags.StringVar(&o.CacheDir, "cni-cache-dir", "/var/lib/cni", "where the runtime keeps what it attached containers with")
	flags.StringVar(&f.systemd, "systemd", systemdAuto, "run the daemon as a systemd unit: on, off, or auto for where systemd runs")
	flags.StringVar(&f.unit.Dir, "unit-dir", "/etc/systemd/system", "directory of systemd units")
	flags.DurationVar(&f.wait, "timeout", time.Minute, "longest time all of it may take")
	flags.BoolVar(&o.DryRun, "dry-run", false, "say what would be done")
}

func (f *installFlags) settle(flags *pflag.FlagSet) {
	flags.DurationVar(&f.options.Settle, "settle", 2*time.Second, "of uninstalling: time for runtimes to read the configuration before what it named goes")
}

// installOptions makes all paths absolute, and finds out about systemd.
func (a *app) installOptions(f installFlags) (install.Options, error) {
	o := f.options
	o.RunDir, o.Version, o.Logger = a.runDirectory(), version, a.logger()
	o.Entry = json.RawMessage(f.entry)
	o.Pins = a.options()
	o.Pins.Capacity = f.capacity
	o.Daemon = func() (bool, error) {
		_, running, err := a.daemon()
		return running, err
	}
	for _, path := range []*string{
		&o.ConfDir, &o.BinDir, &o.Conflist, &o.CommandDir, &o.Source, &o.StateDir, &o.CacheDir, &o.RunDir,
		&f.unit.Dir, &f.unit.PolicyDir, &o.Pins.Layout.BPFFS,
	} {
		if *path == "" {
			continue
		}
		absolute, err := filepath.Abs(*path)
		if err != nil {
			return o, err
		}
		*path = absolute
	}
	use, err := usesSystemd(f.systemd)
	if err != nil || !use {
		return o, err
	}
	f.unit.Name = "podgate.service"
	if name := a.layout.Name; name != "podgate" {
		f.unit.Name = "podgate-" + name + ".service"
	}
	f.unit.Systemctl = install.Systemctl
	o.Unit = &f.unit
	return o, nil
}

// usesSystemd: sd_booted(3) says how one finds out.
func usesSystemd(flag string) (bool, error) {
	switch flag {
	case systemdOn, systemdOff:
		return flag == systemdOn, nil
	case systemdAuto:
		_, err := os.Lstat("/run/systemd/system")
		if errors.Is(err, fs.ErrNotExist) {
			return false, nil
		}
		return err == nil, err
	}
	return false, fmt.Errorf("--systemd %q is not one of %s, %s, %s", flag, systemdAuto, systemdOn, systemdOff)
}

// changes is what was done, and what was not.
type changes struct {
	Steps []string `json:"steps"`
	Left  []string `json:"left,omitempty"`
}

func (c *changes) step(what string) { c.Steps = append(c.Steps, what) }

func (c *changes) text(w *bytes.Buffer) {
	for _, s := range c.Steps {
		fmt.Fprintln(w, s)
	}
	for _, l := range c.Left {
		fmt.Fprintln(w, "left:", l)
	}
}
