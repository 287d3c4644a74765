// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/podgate/podgate/test/netlab"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	var o options
	sizes := flag.String("pods", "1500,15000,30000,75000,150000", "pods in the cluster, one run each")
	flag.IntVar(&o.rate, "rate", 1000, "events a second")
	flag.DurationVar(&o.churn, "churn", 30*time.Second, "how long there is churn")
	flag.DurationVar(&o.rest, "rest", 15*time.Second, "how long there is none before that")
	flag.StringVar(&o.podgate, "podgate", "", "podgate binary; built from -source if empty")
	flag.StringVar(&o.source, "source", "../..", "podgate's source tree")
	flag.StringVar(&o.profiles, "profiles", "", "directory for profiles and metrics of the daemon, which cost it some time and memory; none if empty")
	out := flag.String("out", "", "directory of results.json and the figures, where other sizes stay; none if empty")
	flag.Parse()
	if err := run(ctx, o, *sizes, *out); err != nil {
		fmt.Fprintln(os.Stderr, "scale:", err)
		os.Exit(1)
	}
}

// options of a run.
type options struct {
	rate    int
	churn   time.Duration
	rest    time.Duration
	podgate string
	source  string
	plugins string
	// profiles is where they go.
	profiles string
}

// result is what was measured in a cluster of one size.
type result struct {
	size
	Endpoints int `json:"endpoints"`
	// Ready is how long after its start the daemon has everything in the kernel,
	// StartCPU and StartBytes what that takes.
	Ready      float64 `json:"readySeconds"`
	StartCPU   float64 `json:"startCPUSeconds"`
	StartBytes int64   `json:"startBytes"`
	StartPeak  int64   `json:"startPeakBytes"`
	// RSS and PSS after a while without changes.
	RSS int64 `json:"rssBytes"`
	PSS int64 `json:"pssBytes"`
	// Under churn.
	Rate float64 `json:"eventsPerSecond"`
	CPU  float64 `json:"cpuShare"` // of one processor
	// Waited is for how long, of each second, threads of the daemon were ready to
	// run and had none.
	Waited   float64 `json:"waitedShare"`
	Bytes    float64 `json:"bytesPerSecond"`
	ChurnRSS int64   `json:"churnRSSBytes"`
	ChurnPSS int64   `json:"churnPSSBytes"`
	Peak     int64   `json:"peakBytes"`
	Requests int64   `json:"requests"`
	Latency  latency `json:"latencyMilliseconds"`
	ByKind   map[string]latency
}

// latency is from an event until the kernel judges by it.
type latency struct {
	Count         int
	P50, P99, Max float64
}

func latencyOf(all []time.Duration) latency {
	all = slices.Sorted(slices.Values(all))
	if len(all) == 0 {
		return latency{}
	}
	ms := func(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
	return latency{len(all), ms(all[len(all)/2]), ms(all[len(all)*99/100]), ms(all[len(all)-1])}
}

func run(ctx context.Context, o options, sizes, out string) (err error) {
	dir, err := os.MkdirTemp("", "podgate-scale-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	for _, dir := range []*string{&out, &o.profiles} {
		if *dir == "" {
			continue
		}
		if *dir, err = filepath.Abs(*dir); err != nil {
			return err
		}
	}
	if err := os.Chdir(o.source); err != nil {
		return err
	}
	o.plugins = dir
	if err := netlab.Build(ctx, dir); err != nil {
		return err
	}
	if o.podgate == "" {
		o.podgate = filepath.Join(dir, "podgate")
		build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", o.podgate, "./cmd/podgate")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if output, err := build.CombinedOutput(); err != nil {
			return fmt.Errorf("build podgate: %w\n%s", err, output)
		}
	}
	results, err := former(out)
	if err != nil {
		return err
	}
	for word := range strings.SplitSeq(sizes, ",") {
		pods, err := strconv.Atoi(word)
		if err != nil {
			return err
		}
		r, err := measure(ctx, o, sizeOf(pods))
		if err != nil {
			return fmt.Errorf("%d pods: %w", pods, err)
		}
		// Those of other sizes stay.
		results = append(slices.DeleteFunc(results, func(o result) bool { return o.size == r.size }), r)
		slices.SortFunc(results, func(a, b result) int { return a.Pods - b.Pods })
		report(r)
		if err := write(results, out); err != nil {
			return err
		}
	}
	return nil
}

// former reads what was measured before.
func former(out string) (results []result, err error) {
	if out == "" {
		return nil, nil
	}
	b, err := os.ReadFile(filepath.Join(out, "results.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return results, json.Unmarshal(b, &results)
}

// write writes what was measured so far into a directory, if there is one.
func write(results []result, out string) error {
	if out == "" {
		return nil
	}
	b, err := json.MarshalIndent(results, "", "  ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(out, "results.json"), append(b, '\n'), 0o644); err != nil {
		return err
	}
	return plotAll(results, out)
}

func report(r result) {
	mb := func(n int64) float64 { return float64(n) / (1 << 20) }
	fmt.Printf("%d nodes, %d pods, %d policies, %d services\n", r.Nodes, r.Pods, r.Policies, r.Services)
	fmt.Printf("  start   ready in %.1f s, %.1f s of CPU, %.0f MB read, %.0f MB at most\n", r.Ready, r.StartCPU, mb(r.StartBytes), mb(r.StartPeak))
	fmt.Printf("  at rest %.0f MB RSS, %.0f MB PSS\n", mb(r.RSS), mb(r.PSS))
	fmt.Printf("  churn   %.0f events/s, %.1f %% CPU (%.1f %% waited for one), %.2f MB/s, %.0f MB RSS, %.0f MB at most\n", r.Rate, 100*r.CPU, 100*r.Waited, r.Bytes/(1<<20), mb(r.ChurnRSS), mb(r.Peak))
	for _, kind := range append(slices.Sorted(maps.Keys(r.ByKind)), "") {
		l, ok := r.ByKind[kind]
		if !ok {
			kind, l = "all", r.Latency
		}
		fmt.Printf("  %-15s %4d, p50 %.1f ms, p99 %.1f ms, max %.1f ms\n", kind, l.Count, l.P50, l.P99, l.Max)
	}
}

// measure runs a daemon in a cluster of one size.
func measure(ctx context.Context, o options, s size) (r result, err error) {
	r.size = s
	n, err := newNode(o.plugins)
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, n.Close()) }()
	w, err := newWorld(s, n.server)
	if err != nil {
		return r, err
	}
	began := time.Now()
	if err := n.start(ctx, o.podgate); err != nil {
		return r, err
	}
	if err := n.ready(ctx); err != nil {
		return r, err
	}
	r.Ready, r.StartBytes = time.Since(began).Seconds(), n.server.bytes.Load()
	pid := n.daemon.Process.Pid
	u, err := usageOf(pid)
	if err != nil {
		return r, err
	}
	r.StartCPU, r.StartPeak = u.CPU.Seconds(), u.Peak
	if err := n.attach(ctx, w); err != nil {
		return r, err
	}
	r.Endpoints = len(n.gates)
	c, err := newCanaries(w, n)
	if err != nil {
		return r, err
	}
	if err := errors.Join(c.settle(ctx), pause(ctx, o.rest)); err != nil {
		return r, err
	}
	before, err := usageOf(pid)
	if err != nil {
		return r, err
	}
	r.RSS, r.PSS = before.RSS, before.PSS
	if err := errors.Join(
		n.profile(ctx, o.profiles, "/metrics", fmt.Sprintf("metrics-%d.txt", s.Pods)),
		n.profile(ctx, o.profiles, "/debug/pprof/heap?gc=1", fmt.Sprintf("heap-%d.pprof", s.Pods)),
	); err != nil {
		return r, err
	}

	// The first seconds are not counted: what goes out has to come to its rate.
	stop := make(chan struct{})
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return w.churn(o.rate, stop) })
	g.Go(func() error {
		defer close(stop)
		if err := pause(ctx, 4*time.Second); err != nil {
			return err
		}
		before, err := usageOf(pid)
		if err != nil {
			return err
		}
		bytes, frames, from := n.server.bytes.Load(), n.server.frames.Load(), time.Now()
		during, cancel := context.WithTimeout(ctx, o.churn)
		defer cancel()
		name := fmt.Sprintf("cpu-%d.pprof", s.Pods)
		if err := n.profiled(ctx, o.profiles, name, o.churn, func(context.Context) error { return c.run(during) }); err != nil {
			return err
		}
		took := time.Since(from).Seconds()
		after, err := usageOf(pid)
		if err != nil {
			return err
		}
		if err := n.profile(ctx, o.profiles, "/debug/pprof/allocs", fmt.Sprintf("allocs-%d.pprof", s.Pods)); err != nil {
			return err
		}
		r.Rate = float64(n.server.frames.Load()-frames) / took
		r.Bytes = float64(n.server.bytes.Load()-bytes) / took
		r.CPU = (after.CPU - before.CPU).Seconds() / took
		r.Waited = (after.Waited - before.Waited).Seconds() / took
		r.ChurnRSS, r.ChurnPSS, r.Peak = after.RSS, after.PSS, after.Peak
		return nil
	})
	if err := g.Wait(); err != nil {
		return r, fmt.Errorf("%w\n%s", err, n.log.Bytes())
	}
	r.Requests = n.server.requests.Load()
	var all []time.Duration
	r.ByKind = make(map[string]latency)
	for kind, took := range c.took {
		r.ByKind[kind] = latencyOf(took)
		all = append(all, took...)
	}
	r.Latency = latencyOf(all)
	return r, nil
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}
