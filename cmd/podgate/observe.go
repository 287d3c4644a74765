// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/podgate/podgate/observe"
	"github.com/podgate/podgate/observe/history"
	"github.com/podgate/podgate/observe/hubble"
	obsmetrics "github.com/podgate/podgate/observe/metrics"
	"github.com/podgate/podgate/observe/naming"
	"github.com/podgate/podgate/pinning"
	"github.com/podgate/podgate/syncd/apiserver"
	"github.com/podgate/podgate/syncd/manifest"
	"github.com/podgate/podgate/syncd/metrics"
	"github.com/podgate/podgate/syncd/nodeaddr"
	"github.com/podgate/podgate/syncd/source"
)

// observeFlags are those of the observe command.
type observeFlags struct {
	origin  origin
	cluster string
	history int
	socket  string
	listen  string
	files   hubble.TLSFiles
	noTLS   bool
	peers   map[string]string
	metrics string
	series  int
	pprof   bool
}

func (a *app) observeCommand() *cobra.Command {
	var f observeFlags
	cmd := &cobra.Command{
		Use:   "observe",
		Short: "Serve flows and drops to Hubble's command line, relay and user interface",
		Long: `Reads the events of the datapath, names what they are about, and serves them over
Hubble's API: on a unix socket, and with --listen to other machines.

Names are those of the API server or of the directory that "podgate sync" follows
on this node, unless --kubeconfig or --policy-dir names another one. Without any
they are what the runtime told ADD.

It only reads: what is enforced does not depend on it. While it runs, "podgate
flows" asks it.`,
		Example: `  podgate observe
  hubble observe --server unix:///run/podgate/podgate/hubble.sock --follow --verdict DROPPED
  podgate observe --kubeconfig in-cluster --listen :4244 --tls-cert-file tls.crt --tls-key-file tls.key --tls-client-ca-file ca.crt`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !cmd.Flags().Changed("log-level") {
				a.logLevel = slog.LevelInfo
			}
			return a.observe(cmd.Context(), f)
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&f.origin.Kubeconfig, "kubeconfig", "", "name by the API server of this kubeconfig, or "+apiserver.InCluster)
	flags.StringVar(&f.origin.PolicyDir, "policy-dir", "", "name by this directory of manifests")
	flags.StringVar(&f.origin.Node, "node-name", "", "name of this node, as in spec.nodeName (default $NODE_NAME, or the host name)")
	flags.StringVar(&f.cluster, "cluster-name", "default", "name of the cluster in flows")
	flags.IntVar(&f.history, "history", 4095, "events to remember")
	flags.StringVar(&f.socket, "socket", "", "unix socket to serve on (default hubble.sock in the run directory)")
	flags.StringVar(&f.listen, "listen", "", "address to serve other machines on, such as :4244 (default none)")
	flags.StringVar(&f.files.Certificate, "tls-cert-file", "", "certificate for --listen")
	flags.StringVar(&f.files.Key, "tls-key-file", "", "its key")
	flags.StringVar(&f.files.ClientCA, "tls-client-ca-file", "", "certificates of who signs those of clients")
	flags.BoolVar(&f.noTLS, "disable-server-tls", false, "serve --listen in plain text to anybody")
	flags.StringToStringVar(&f.peers, "peer", nil, "other nodes that observe, as NAME=ADDRESS, where no API server names them")
	flags.StringVar(&f.metrics, "metrics", "", "address to serve Prometheus metrics, /healthz and /readyz on, such as 127.0.0.1:9091 (default none)")
	flags.IntVar(&f.series, "metrics-series", 10000, "series of one metric at most; what would be more is counted as \"other\"")
	flags.BoolVar(&f.pprof, "pprof", false, "serve /debug/pprof with the metrics")
	cmd.MarkFlagsMutuallyExclusive("kubeconfig", "policy-dir")
	cmd.MarkFlagsRequiredTogether("tls-cert-file", "tls-key-file", "tls-client-ca-file")
	cmd.MarkFlagsMutuallyExclusive("tls-cert-file", "disable-server-tls")
	if err := errors.Join(cmd.MarkFlagDirname("policy-dir"), cmd.MarkFlagFilename("kubeconfig"), cmd.MarkFlagFilename("tls-cert-file"),
		cmd.MarkFlagFilename("tls-key-file"), cmd.MarkFlagFilename("tls-client-ca-file")); err != nil {
		panic(err) // a flag that does not exist
	}
	return cmd
}

// hubbleSocket is where observe serves, unless it was told another place.
func (a *app) hubbleSocket() string { return filepath.Join(a.runDirectory(), "hubble.sock") }

func (a *app) observe(ctx context.Context, f observeFlags) (err error) {
	logger := a.logger()
	for flag, n := range map[string]int{"history": f.history, "metrics-series": f.series} {
		if n < 1 {
			return fmt.Errorf("--%s %d: must be at least 1", flag, n)
		}
	}
	if err := a.observeOrigin(&f.origin); err != nil {
		return err
	}
	local, err := hubble.Listen(ctx, cmp.Or(f.socket, a.hubbleSocket()))
	if err != nil {
		return err
	}
	defer local.Close()
	remote, files, err := f.remote(ctx)
	if err != nil {
		return err
	}
	options := hubble.Options{Node: f.origin.Node, Cluster: f.cluster, Version: version, TLS: files != nil}
	if remote != nil {
		defer remote.Close()
		if options.Address, err = advertised(remote.Addr()); err != nil {
			return err
		}
	}
	names := naming.NewTable(naming.Options{Node: f.origin.Node, Cluster: f.cluster, Local: nodeaddr.List})
	ring := history.New(f.history)
	server := hubble.NewServer(ring, names, options)
	if err := f.namePeers(names); err != nil {
		return err
	}
	traffic := obsmetrics.NewTraffic(f.series)
	observer := observe.New(observe.Options{
		State: a.options(), Names: names, Ring: ring, Logger: logger,
		Saw: func(records []history.Record) {
			server.Saw(records)
			traffic.Saw(records)
		},
	})

	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return observer.Run(ctx) })
	g.Go(func() error { return server.Serve(ctx, local, remote, files) })
	if !f.origin.empty() {
		g.Go(func() error { return a.followNames(ctx, f.origin, names, logger) })
	}
	if f.metrics != "" {
		kernel := obsmetrics.NewKernel(func(ctx context.Context) (obsmetrics.State, error) { return a.open(ctx) }, names, f.series)
		g.Go(func() error { return scan(ctx, kernel, logger) })
		server := metrics.Server{Gatherer: metrics.NewRegistry(traffic, kernel), Health: observer, Profiles: f.pprof}
		g.Go(func() error { return server.Serve(ctx, f.metrics) })
	}
	return g.Wait()
}

// scanInterval is how often the table of flows is looked through: what is
// closed stays in it for longer.
const scanInterval = 5 * time.Second

func scan(ctx context.Context, kernel *obsmetrics.Kernel, logger *slog.Logger) error {
	tick := time.NewTicker(scanInterval)
	defer tick.Stop()
	for {
		if err := kernel.Scan(ctx); err != nil && !errors.Is(err, pinning.ErrNotInstalled) && ctx.Err() == nil {
			logger.Warn("flows are not looked through", "error", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// namePeers makes known the nodes that --peer names.
func (f *observeFlags) namePeers(names *naming.Table) error {
	var b source.Batch
	for name, address := range f.peers {
		addr, err := netip.ParseAddr(address)
		if err != nil {
			return fmt.Errorf("--peer %s=%s: %w", name, address, err)
		}
		b.Set = append(b.Set, manifest.Object{Key: manifest.Key{Kind: manifest.KindNode, Name: name}, Addresses: []netip.Addr{addr}})
	}
	names.Apply(b)
	return nil
}

// observeOrigin completes where names come from: from where podgate sync has its
// policy, if nothing else was said.
func (a *app) observeOrigin(o *origin) error {
	if o.empty() {
		s, _, err := a.daemon()
		if err != nil {
			return err
		}
		if s != nil {
			node := cmp.Or(o.Node, s.Node)
			o.Origin = s.Origin
			o.Node = node
		}
	}
	return o.completeNode(a.Getenv)
}

// followNames keeps the names equal to what the source says. Without it traffic
// has poorer names.
func (a *app) followNames(ctx context.Context, o origin, names *naming.Table, logger *slog.Logger) error {
	from, err := o.openNames(a.runDirectory(), logger)
	if err != nil {
		return err
	}
	var last []source.Problem
	for ctx.Err() == nil {
		err := from.Run(ctx, func(b source.Batch) {
			names.Apply(b)
			for _, p := range b.Problems {
				if !contains(last, p) {
					logger.Warn("names may be missing", "subject", p.Subject, "reason", p.Reason)
				}
			}
			last = b.Problems
		})
		if err != nil {
			logger.Warn("no names but those of the runtime", "error", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(10 * time.Second):
		}
	}
	return nil
}

func contains(problems []source.Problem, p source.Problem) bool {
	for _, q := range problems {
		if q.Subject == p.Subject && q.Reason == p.Reason {
			return true
		}
	}
	return false
}

// openNames makes the source of names.
func (o *origin) openNames(runDir string, logger *slog.Logger) (source.Source, error) {
	if o.Kubeconfig == "" {
		return source.NewDirectory(source.DirectoryOptions{
			Path: o.PolicyDir, Cache: cacheDirectory(runDir), ReadOnly: true, Logger: logger,
		}), nil
	}
	config, err := apiserver.Config(o.Kubeconfig, "podgate-observe/"+version)
	if err != nil {
		return nil, err
	}
	return apiserver.New(apiserver.Options{Config: config, Node: o.Node, Names: true, Logger: logger})
}

// remote opens what --listen names.
func (f *observeFlags) remote(ctx context.Context) (net.Listener, *hubble.TLSFiles, error) {
	if f.listen == "" {
		return nil, nil, nil
	}
	var files *hubble.TLSFiles
	if !f.noTLS {
		if f.files.Certificate == "" {
			return nil, nil, errors.New("--listen needs --tls-cert-file, --tls-key-file and --tls-client-ca-file, or --disable-server-tls")
		}
		if err := f.files.Check(); err != nil {
			return nil, nil, err
		}
		files = &f.files
	}
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", f.listen)
	if err != nil {
		return nil, nil, fmt.Errorf("--listen: %w", err)
	}
	return l, files, nil
}

// advertised is the address to reach a listener at: its own, or one of the
// node's if it listens on all of them.
func advertised(a net.Addr) (netip.AddrPort, error) {
	at, err := netip.ParseAddrPort(a.String())
	if err != nil {
		return netip.AddrPort{}, err
	}
	if !at.Addr().IsUnspecified() {
		return netip.AddrPortFrom(at.Addr().Unmap(), at.Port()), nil
	}
	addrs, err := nodeaddr.List()
	if err != nil {
		return netip.AddrPort{}, err
	}
	for _, addr := range addrs {
		if !addr.IsLinkLocalUnicast() {
			return netip.AddrPortFrom(addr, at.Port()), nil
		}
	}
	return netip.AddrPortFrom(at.Addr(), at.Port()), nil
}
