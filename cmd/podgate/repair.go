// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"bytes"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/podgate/podgate/pinning"
)

func (a *app) repairCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "repair",
		Short: "Put back lost attachments and sweep what belongs to nobody",
		Long: `Attaches the programs again where something removed them, removes endpoints
whose interface is gone, and pins that belong to no endpoint. The daemon does the
same by itself.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			state, err := a.open(cmd.Context())
			if err != nil {
				return err
			}
			defer state.Close()
			done, err := state.Repair(cmd.Context())
			type repair struct {
				Endpoint string `json:"endpoint,omitempty"`
				What     string `json:"what"`
			}
			repairs := []repair{}
			for _, r := range done {
				x := repair{What: r.What}
				if r.Endpoint != (pinning.AttachmentKey{}) {
					x.Endpoint = r.Endpoint.String()
				}
				repairs = append(repairs, x)
			}
			return errors.Join(err, a.print(repairs, func(w *bytes.Buffer) {
				if len(repairs) == 0 && err == nil {
					fmt.Fprintln(w, "nothing to repair")
				}
				for _, r := range repairs {
					fmt.Fprintln(w, strings.TrimPrefix(r.Endpoint+": "+r.What, ": "))
				}
			}))
		},
	}
}

func (a *app) gcCommand() *cobra.Command {
	var (
		network string
		keep    []string
		all     bool
	)
	cmd := &cobra.Command{
		Use:   "gc --network NAME --keep CONTAINER/IFNAME...",
		Short: "Remove the endpoints of a CNI network except those named",
		Long: `Removes the endpoints of a CNI network except those named, as the CNI verb GC
does, for runtimes that never call it. What loses its endpoint is not enforced
any more: name every attachment that is alive.`,
		Example: `  podgate gc --network pods --keep 4f6a…/eth0 --keep 9b21…/eth0`,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if len(keep) == 0 && !all {
				return errors.New("without --keep every endpoint of the network goes; say so with --all")
			}
			kept := make(map[pinning.AttachmentKey]struct{})
			for _, k := range keep {
				container, ifname, ok := strings.Cut(k, "/")
				if !ok || container == "" || ifname == "" {
					return fmt.Errorf("--keep %q is not like CONTAINER/IFNAME", k)
				}
				kept[pinning.AttachmentKey{ContainerID: container, IfName: ifname}] = struct{}{}
			}
			state, err := a.open(cmd.Context())
			if err != nil {
				return err
			}
			defer state.Close()
			removed, err := state.GC(cmd.Context(), network, kept)
			if removed == nil {
				removed = []pinning.AttachmentKey{}
			}
			return errors.Join(err, a.print(removed, func(w *bytes.Buffer) {
				for _, k := range removed {
					fmt.Fprintln(w, k)
				}
			}))
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&network, "network", "", "name of the CNI network")
	flags.StringArrayVar(&keep, "keep", nil, "attachment that stays: container ID and interface")
	flags.BoolVar(&all, "all", false, "remove all endpoints of the network")
	cmd.MarkFlagsMutuallyExclusive("keep", "all")
	if err := cmd.MarkFlagRequired("network"); err != nil {
		panic(err) // a flag that does not exist
	}
	return cmd
}
