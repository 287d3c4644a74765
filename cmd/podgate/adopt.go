// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"bytes"
	"errors"
	"fmt"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/podgate/podgate/install"
)

func (a *app) adoptCommand() *cobra.Command {
	var o install.AdoptOptions
	cmd := &cobra.Command{
		Use:   "adopt",
		Short: "Gate containers that were started before podgate was installed",
		Long: `Gates the containers that the runtime has attached to a network that podgate is
part of by now. They go on running, and so do their TCP connections as far as
policy allows them: who opened a connection is read from the container's
sockets.

Until the policy of such a container is known, its gate is open, as it was
before. Let "podgate sync" run first, then it is known at once.

If one cannot be gated the exit code is 2.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			for _, path := range []*string{&o.ConfDir, &o.BinDir, &o.CacheDir} {
				absolute, err := filepath.Abs(*path)
				if err != nil {
					return err
				}
				*path = absolute
			}
			o.Pins = a.options()
			adopted, err := install.Adopt(cmd.Context(), o)
			if err != nil {
				return errors.Join(err, a.printAdopted(adopted))
			}
			for _, c := range adopted {
				if c.Error != "" {
					err = errProblem
				}
			}
			return errors.Join(err, a.printAdopted(adopted))
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&o.ConfDir, "conf-dir", "/etc/cni/net.d", "directory of network configurations")
	flags.StringVar(&o.BinDir, "bin-dir", "/opt/cni/bin", "directory of CNI plugins")
	flags.StringVar(&o.CacheDir, "cni-cache-dir", "/var/lib/cni", "where the runtime keeps what it attached containers with")
	flags.BoolVar(&o.DryRun, "dry-run", false, "say which would be gated")
	return cmd
}

func (a *app) printAdopted(adopted []install.Adopted) error {
	return a.print(adopted, func(w *bytes.Buffer) {
		if len(adopted) == 0 {
			fmt.Fprintln(w, "no container is without a gate")
			return
		}
		rows := [][]cell{row("CONTAINER", "POD", "NETWORK", "CONNECTIONS", "ERROR")}
		for _, c := range adopted {
			rows = append(rows, row(c.String(), c.Pod, c.Network, fmt.Sprint(c.Connections), c.Error))
		}
		a.table(w, rows)
	})
}
