// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sync/errgroup"

	"github.com/podgate/podgate/pinning"
	"github.com/podgate/podgate/syncd"
	"github.com/podgate/podgate/syncd/apiserver"
	"github.com/podgate/podgate/syncd/inventory"
	"github.com/podgate/podgate/syncd/metrics"
	"github.com/podgate/podgate/syncd/source"
	"github.com/podgate/podgate/syncd/status"
)

// syncFlags are those of the sync command.
type syncFlags struct {
	origin   origin
	once     bool
	metrics  string
	pprof    bool
	capacity pinning.Capacity
}

func (a *app) syncCommand() *cobra.Command {
	var f syncFlags
	cmd := &cobra.Command{
		Use:   "sync {--kubeconfig FILE | --kubeconfig in-cluster | --policy-dir DIR}",
		Short: "Keep what is enforced equal to the cluster's policy, or to a directory of manifests",
		Long: `Keeps the kernel's tables equal to what policy says, and follows changes of it and
of the node's pods.

With --kubeconfig policy is that of a cluster: Namespaces, Pods and
NetworkPolicies of its API server. "in-cluster" stands for the service account
of the pod this runs in. A server that does not answer changes nothing.

With --policy-dir it is what Kubernetes manifests in a directory say (Namespace,
Pod, NetworkPolicy; YAML or JSON, also as "kubectl get -o yaml" prints them). A
file that is broken keeps its last good policy and is named in the log, in the
metrics and by "podgate status". Pods without a manifest are in the namespace
the runtime names, or "default", with the labels of args.cni.labels. Manifests
of pods on other nodes say what address has which labels.

What is enforced stays when this process ends, however it ends.`,
		Example: `  podgate sync --kubeconfig /etc/podgate/kubeconfig
  podgate sync --policy-dir /etc/podgate/policies
  podgate sync --policy-dir ./policies --once`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !cmd.Flags().Changed("log-level") {
				a.logLevel = slog.LevelInfo
			}
			return a.sync(cmd.Context(), f)
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&f.origin.Kubeconfig, "kubeconfig", "", "kubeconfig of the cluster, or "+apiserver.InCluster)
	flags.StringVar(&f.origin.PolicyDir, "policy-dir", "", "directory of manifests")
	flags.StringVar(&f.origin.Node, "node-name", "", "name of this node, as in spec.nodeName (default $NODE_NAME, or the host name)")
	flags.BoolVar(&f.origin.AuditPods, "audit-pods", false, auditPodsUsage)
	flags.BoolVar(&f.once, "once", false, "apply the present state and exit; exit code 2 if some of it could not be")
	flags.StringVar(&f.metrics, "metrics", "", "address to serve Prometheus metrics, /healthz and /readyz on, such as 127.0.0.1:9090 (default none)")
	flags.BoolVar(&f.pprof, "pprof", false, "serve /debug/pprof with the metrics")
	capacityFlags(flags, &f.capacity)
	cmd.MarkFlagsOneRequired("kubeconfig", "policy-dir")
	cmd.MarkFlagsMutuallyExclusive("kubeconfig", "policy-dir")
	if err := errors.Join(cmd.MarkFlagDirname("policy-dir"), cmd.MarkFlagFilename("kubeconfig")); err != nil {
		panic(err) // a flag that does not exist
	}
	return cmd
}

// capacityFlags are those of the commands that make an instance. An instance
// that exists keeps the capacity it has.
func capacityFlags(flags *pflag.FlagSet, c *pinning.Capacity) {
	d := pinning.DefaultCapacity()
	for _, f := range []struct {
		name  string
		field *uint32
		value uint32
		usage string
	}{
		{"endpoints", &c.Endpoints, d.Endpoints, "endpoints at once"},
		{"flows", &c.Flows, d.Flows, "flows tracked"},
		{"peers", &c.Peers, d.Peers, "pod addresses that policy tells apart"},
		{"blocks", &c.Blocks, d.Blocks, "CIDR prefixes"},
		{"cells", &c.Cells, d.Cells, "pairs of ruleset and class"},
		{"rules", &c.Rules, d.Rules, "rules of all policies"},
		{"services", &c.Services, d.Services, "addresses with a port at which Services are reached"},
		{"fragments", &c.Fragments, d.Fragments, "fragmented datagrams under way"},
		{"event-bytes", &c.EventBytes, d.EventBytes, "bytes of the event ring, a power of two"},
	} {
		flags.Uint32Var(f.field, "capacity-"+f.name, f.value, f.usage+"; fixed when the state is made")
	}
}

func (a *app) sync(ctx context.Context, f syncFlags) (err error) {
	logger := a.logger()
	if err := f.origin.complete(a.Getenv); err != nil {
		return err
	}
	run, err := status.Acquire(a.runDirectory())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, run.Close()) }()

	from, err := f.origin.open(source.DirectoryOptions{Cache: cacheDirectory(run.Path())}, logger)
	if err != nil {
		return err
	}

	options := a.options()
	options.Capacity = f.capacity
	state, err := pinning.Ensure(ctx, options)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, state.Close()) }()

	started := a.Now()
	figures, health := metrics.NewDaemon(), metrics.NewHealth()
	daemon := syncd.New(syncd.Options{
		State:  state,
		Source: from,
		Inventory: inventory.Options{
			Node: f.origin.Node, Unlisted: f.origin.unlisted(), AuditPods: f.origin.AuditPods,
		},
		Report: func(s status.Status) {
			s.PID, s.Version, s.Started = os.Getpid(), version, started
			s.Origin, s.Once = f.origin.Origin, f.once
			health.Report(s)
			if err := run.Write(s); err != nil {
				logger.Error("status not written", "error", err)
			}
		},
		Notify:  notifier(from),
		Metrics: figures,
		Logger:  logger,
	})
	if f.once {
		problems, err := daemon.Once(ctx)
		if err != nil {
			return err
		}
		for _, p := range problems {
			a.complain("podgate: %s%s\n", p.Subject, complaint(p))
		}
		if len(problems) > 0 {
			return errProblem
		}
		return nil
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return daemon.Run(ctx) })
	if a.Getenv("GOGC") == "" && a.Getenv("GOMEMLIMIT") == "" { // which know better
		g.Go(func() error {
			limitMemory(ctx)
			return nil
		})
	}
	if f.metrics != "" {
		server := metrics.Server{Gatherer: metrics.NewRegistry(figures), Health: health, Profiles: f.pprof}
		g.Go(func() error { return server.Serve(ctx, f.metrics) })
	}
	return g.Wait()
}

// cacheDirectory is where the daemon keeps the last good version of files.
func cacheDirectory(runDir string) string { return filepath.Join(runDir, "last-good") }

func (a *app) initCommand() *cobra.Command {
	var capacity pinning.Capacity
	cmd := &cobra.Command{
		Use:   "init",
		Short: "Set up the pinned state, or check what is there",
		Long: `Mounts the BPF file system if need be, loads the programs and pins them and
their maps. With the state there already it checks that this version can use it.

Without it the first ADD or "podgate sync" does the same.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			options := a.options()
			options.Capacity = capacity
			state, err := pinning.Ensure(cmd.Context(), options)
			if err != nil {
				return err
			}
			return state.Close()
		},
	}
	capacityFlags(cmd.Flags(), &capacity)
	return cmd
}

func (a *app) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version of this binary and of its pinned layout",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			return a.print(map[string]any{"version": version, "abi": pinning.ABI}, func(w *bytes.Buffer) {
				fmt.Fprintf(w, "podgate %s, pinned layout v%d\n", version, pinning.ABI)
			})
		},
	}
}
