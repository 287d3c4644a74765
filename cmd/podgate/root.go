// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"path/filepath"
	"slices"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/podgate/podgate/install"
	"github.com/podgate/podgate/install/conflist"
	"github.com/podgate/podgate/pinning"
	"github.com/podgate/podgate/syncd/status"
)

// app is what the commands share: the environment and the global flags.
type app struct {
	env
	layout   pinning.Layout
	runDir   string
	mount    bool
	output   string
	logLevel slog.Level
}

func newRoot(e env) *cobra.Command {
	a := &app{env: e, logLevel: slog.LevelWarn}
	root := &cobra.Command{
		Use:   "podgate",
		Short: "Network policy for every pod of this node, from its first packet",
		Long: `podgate enforces network policy on the pods of this node, in the kernel.

"podgate sync" keeps what is enforced equal to the policy of a cluster, or of a
directory of manifests. "podgate install" and its like put podgate on a node and
take it off. The other commands look at what is enforced, and answer who can
reach whom.

Exit codes: 0 done, 1 failed, 2 done and problems found.`,
		SilenceErrors: true,
		SilenceUsage:  true,
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			known := outputs()
			if _, yes := cmd.Annotations[outputYAML]; yes {
				known = append(known, outputYAML)
			}
			if !slices.Contains(known, a.output) {
				return fmt.Errorf("output %q is not one of %v", a.output, known)
			}
			return nil
		},
	}
	root.SetIn(e.Stdin)
	root.SetOut(e.Stdout)
	root.SetErr(e.Stderr)
	root.CompletionOptions.HiddenDefaultCmd = false

	flags := root.PersistentFlags()
	flags.StringVar(&a.layout.BPFFS, "bpffs", "/sys/fs/bpf", "mount point of the BPF file system")
	flags.BoolVar(&a.mount, "mount-bpffs", true, "mount the BPF file system if it is not; in a container that would be there for nobody else")
	flags.StringVar(&a.layout.Name, "instance", "podgate", "instance of podgate on this node")
	flags.StringVar(&a.runDir, "run-dir", "", "directory of the daemon's status (default /run/podgate/INSTANCE)")
	flags.StringVarP(&a.output, "output", "o", outputText, "output format: text or json")
	flags.TextVar(&a.logLevel, "log-level", a.logLevel, "log level: debug, info, warn or error")
	complete(root, "output", outputs()...)
	complete(root, "log-level", "debug", "info", "warn", "error")

	root.AddCommand(
		a.syncCommand(), a.initCommand(), a.statusCommand(), a.policyCommand(), a.flowsCommand(), a.observeCommand(), a.suggestCommand(),
		a.explainCommand(), a.matrixCommand(), a.repairCommand(), a.gcCommand(), a.installCommand(), a.adoptCommand(), a.uninstallCommand(), a.versionCommand(),
	)
	return root
}

// complete registers the values of a flag. It fails only for a flag that does
// not exist.
func complete(cmd *cobra.Command, flag string, values ...string) {
	if err := cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp)); err != nil {
		panic(err)
	}
}

func (a *app) logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(a.Stderr, &slog.HandlerOptions{Level: a.logLevel}))
}

func (a *app) runDirectory() string {
	if a.runDir != "" {
		return a.runDir
	}
	return filepath.Join("/run/podgate", a.layout.Name)
}

func (a *app) options() pinning.Options {
	return pinning.Options{Layout: a.layout, Logger: a.logger(), NoMount: !a.mount}
}

// open adopts the instance for reading.
func (a *app) open(ctx context.Context) (*pinning.State, error) {
	return pinning.Open(ctx, a.options())
}

// daemon reads the daemon's status. It is nil if none ever wrote one.
func (a *app) daemon() (s *status.Status, running bool, err error) {
	got, running, err := status.Read(a.runDirectory())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, running, nil
	}
	if err != nil {
		return nil, running, fmt.Errorf("status of the daemon: %w", err)
	}
	return &got, running, nil
}

// hintFor says what to do about an error, where there is something.
func hintFor(err error) string {
	switch {
	case errors.Is(err, pinning.ErrNotInstalled):
		return `Run "podgate init" or "podgate sync" as root to set it up, or name the right --bpffs and --instance.`
	case errors.Is(err, pinning.ErrNoBPFFS):
		return `Have the node mount it: "mount -t bpf bpf /sys/fs/bpf", as systemd does, and the chart's mountBPFFS.`
	case errors.Is(err, pinning.ErrABI):
		return "This podgate and the one that set the node up are of different versions: use that one, or drain the node and remove the pinned state."
	case errors.Is(err, pinning.ErrFull):
		return `"podgate status" shows what is full. Capacity is fixed when the state is made.`
	case errors.Is(err, conflist.ErrNone):
		return "Set up the runtime's network first, or name its directory with --conf-dir."
	case errors.Is(err, pinning.ErrLocked), errors.Is(err, install.ErrLocked):
		return "Another process holds it; try again when it is done."
	case errors.Is(err, status.ErrRunning):
		return `Stop it first, or choose another --instance. "podgate status" shows its PID.`
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return "Run it as root."
	}
	return ""
}
