// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"os"
	"slices"
	"time"

	flowpb "github.com/cilium/cilium/api/v1/flow"
	observerpb "github.com/cilium/cilium/api/v1/observer"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/encoding/protojson"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/podgate/podgate/observe/suggest"
)

// suggestFlags are those of the suggest command.
type suggestFlags struct {
	suggest.Options
	watch time.Duration
	file  string
}

func (a *app) suggestCommand() *cobra.Command {
	var f suggestFlags
	cmd := &cobra.Command{
		Use:   "suggest",
		Short: "Write the NetworkPolicies that allow what was seen, and nothing else",
		Long: `Makes NetworkPolicies of the flows that "podgate observe" remembers, or of those
in a file that "hubble observe -o jsonpb" wrote, of one node or of all through
Hubble Relay. Workloads are told by the labels of their pods. Each that has been
seen gets a policy that isolates it in both directions and allows what passed,
and what audit mode let through.

What was not seen is not allowed: look on for long enough.`,
		Example: `  podgate suggest --namespace shop > shop.yaml
  podgate suggest --namespace shop --watch 1h
  hubble observe --server relay:443 --namespace shop --last 100000 -o jsonpb | podgate suggest --namespace shop --file -`,
		Args:        cobra.NoArgs,
		Annotations: map[string]string{outputYAML: ""},
		RunE:        func(cmd *cobra.Command, _ []string) error { return a.suggest(cmd.Context(), f) },
	}
	flags := cmd.Flags()
	flags.StringSliceVarP(&f.Namespaces, "namespace", "n", nil, "namespace to suggest policies for (default all that were seen)")
	flags.BoolVar(&f.Denied, "denied", false, "allow also what was denied because no rule allows it")
	flags.DurationVar(&f.watch, "watch", 0, "look on for so long before the policies are made; Ctrl-C ends it earlier")
	flags.StringVar(&f.file, "file", "", `flows to read instead, as "hubble observe -o jsonpb" writes them; - is the standard input`)
	cmd.MarkFlagsMutuallyExclusive("watch", "file")
	if err := cmd.MarkFlagFilename("file"); err != nil {
		panic(err) // a flag that does not exist
	}
	return cmd
}

func (a *app) suggest(ctx context.Context, f suggestFlags) error {
	collector := suggest.New(f.Options)
	seen := 0
	took := func(flow *flowpb.Flow) error {
		seen++
		collector.Add(flow)
		return nil
	}
	var err error
	if f.file != "" {
		err = a.readFlows(f.file, took)
	} else {
		request := &observerpb.GetFlowsRequest{}
		if f.watch > 0 {
			request.Follow, request.Number = true, math.MaxUint64 // what there is, and what comes
			var cancel context.CancelFunc
			ctx, cancel = context.WithTimeout(ctx, f.watch)
			defer cancel()
			a.complain("podgate: looking on for %s\n", f.watch)
		}
		err = a.askObserver(ctx, request, took)
	}
	if err != nil {
		return err
	}
	policies := collector.Policies()
	left := collector.LeftOut()
	for _, what := range slices.Sorted(maps.Keys(left)) {
		a.complain("podgate: left out %s: %s\n", plural(left[what], "flow", "flows"), what)
	}
	a.complain("podgate: %s of %s\n", plural(len(policies), "policy", "policies"), plural(seen, "flow", "flows"))
	return a.writePolicies(policies)
}

// readFlows reads a file of flows, one answer of Hubble's on a line.
func (a *app) readFlows(name string, took func(*flowpb.Flow) error) error {
	in := a.Stdin
	if name != "-" {
		file, err := os.Open(name)
		if err != nil {
			return err
		}
		defer file.Close()
		in = file
	}
	lines := bufio.NewReader(in)
	for number := 1; ; number++ {
		line, err := lines.ReadBytes('\n')
		if text := bytes.TrimSpace(line); len(text) > 0 {
			var answer observerpb.GetFlowsResponse
			if err := protojson.Unmarshal(text, &answer); err != nil {
				return fmt.Errorf("%s:%d: %w", name, number, err)
			}
			if flow := answer.GetFlow(); flow != nil {
				if err := took(flow); err != nil {
					return err
				}
			}
		}
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return fmt.Errorf("%s: %w", name, err)
		}
	}
}

// writePolicies writes what kubectl applies: documents of YAML, or a List.
func (a *app) writePolicies(policies []networkingv1.NetworkPolicy) error {
	if a.output == outputJSON {
		list := networkingv1.NetworkPolicyList{
			TypeMeta: metav1.TypeMeta{APIVersion: networkingv1.SchemeGroupVersion.String(), Kind: "NetworkPolicyList"},
			Items:    append([]networkingv1.NetworkPolicy{}, policies...),
		}
		encoder := json.NewEncoder(a.Stdout)
		encoder.SetIndent("", "  ")
		return encoder.Encode(list)
	}
	for i := range policies {
		text, err := yaml.Marshal(&policies[i])
		if err != nil {
			return err
		}
		if _, err := fmt.Fprintf(a.Stdout, "---\n%s", text); err != nil {
			return err
		}
	}
	return nil
}
