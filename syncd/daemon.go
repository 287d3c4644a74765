// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package syncd

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/podgate/podgate/bpf/policy"
	"github.com/podgate/podgate/pinning"
	"github.com/podgate/podgate/syncd/inventory"
	"github.com/podgate/podgate/syncd/metrics"
	"github.com/podgate/podgate/syncd/nodeaddr"
	"github.com/podgate/podgate/syncd/source"
	"github.com/podgate/podgate/syncd/status"
)

// State is what the daemon needs of a [pinning.State].
type State interface {
	Endpoints() iter.Seq2[pinning.Endpoint, error]
	Bind(ctx context.Context, key pinning.AttachmentKey, pod policy.PodKey) error
	Apply(ctx context.Context, update policy.Update) (pinning.Applied, error)
	SetNodeAddresses(ctx context.Context, addrs []netip.Addr) error
	SetServices(ctx context.Context, all []pinning.Service) error
	MoveBackends(ctx context.Context, moved []pinning.Service) error
	ServicesMode() (pinning.ServicesMode, error)
	Repair(ctx context.Context) ([]pinning.Repaired, error)
	Upgrade(ctx context.Context) (bool, error)
	Inherit(ctx context.Context) (bool, error)
	TakeOver(ctx context.Context) (bool, error)
	Watch(ctx context.Context) (<-chan struct{}, error)
	Enforcement(ep pinning.Endpoint) (pinning.Enforcement, error)
	Usage() ([]pinning.MapUsage, error)
}

// Options of a [Daemon]. Zero durations mean the defaults.
type Options struct {
	State     State
	Source    source.Source
	Inventory inventory.Options
	// NodeAddresses delivers the node's addresses and their changes until ctx
	// is done; [nodeaddr.Watch] if nil.
	NodeAddresses func(ctx context.Context, logger *slog.Logger, deliver func([]netip.Addr)) error
	// Report is told how the daemon is, at least once in [status.Interval]. It
	// fills in what it knows better: process, version, place.
	Report func(status.Status)
	// Notify is told each problem when it appears; it may be nil.
	Notify func(source.Problem)
	// Metrics may be nil.
	Metrics *metrics.Daemon
	Logger  *slog.Logger

	// Grace is how long what an update replaced is kept, for packets under way
	// and for updates that follow at once, and the least time between two
	// repairs; default 1 s.
	Grace time.Duration
	// Retry is how long after a failure everything is applied again, at first;
	// it doubles up to Repair. Default 1 s.
	Retry time.Duration
	// Repair is how often attachments are checked without a sign of trouble;
	// default [status.Interval], which is also the most.
	Repair time.Duration
}

// Daemon keeps the state of one node up to date.
type Daemon struct {
	opts      Options
	log       *slog.Logger
	inventory *inventory.Inventory
	compiler  *policy.Compiler
	problems  problems
	synced    time.Time
	applied   time.Time
	// endpoints as last read, if listed: what has not been seen might look
	// like gone. They have to be read again if moved.
	endpoints []pinning.Endpoint
	listed    bool
	moved     bool
	// nodeAddrs are to be set if there are any.
	nodeAddrs []netip.Addr
	services  services
	// repaired is when the last repair ended, reported when the last report was
	// made.
	repaired, reported time.Time
	// stale says that the state may miss something the compiler told before.
	stale bool
	// short says that something found no room in the state, which goes on with
	// the rest: all of it is worth another try only when something has gone,
	// which tries counts.
	short bool
	tries int
	// tried is when all was written last, retry how long after it is tried
	// again.
	tried time.Time
	retry time.Duration
	// pending is how many revisions of the source the state does not have yet.
	pending int
	fill    fill
	// former says that another version has endpoints, or may get some.
	former bool
}

// New is a daemon that has not begun.
func New(opts Options) *Daemon {
	opts.Grace = cmp.Or(opts.Grace, time.Second)
	opts.Retry = cmp.Or(opts.Retry, time.Second)
	opts.Repair = min(cmp.Or(opts.Repair, status.Interval), status.Interval)
	if opts.NodeAddresses == nil {
		opts.NodeAddresses = nodeaddr.Watch
	}
	if opts.Report == nil {
		opts.Report = func(status.Status) {}
	}
	if opts.Notify == nil {
		opts.Notify = func(source.Problem) {}
	}
	if opts.Metrics == nil {
		opts.Metrics = metrics.NewDaemon()
	}
	if opts.Logger == nil {
		opts.Logger = slog.New(slog.DiscardHandler)
	}
	return &Daemon{
		opts:      opts,
		log:       opts.Logger,
		inventory: inventory.New(opts.Inventory),
		compiler:  policy.NewCompiler(),
		services:  newServices(),
		problems:  newProblems(opts.Logger, opts.Notify),
		retry:     opts.Retry,
		fill:      newFill(opts.Logger),
		moved:     true,
	}
}

// Once applies the present state of the source and of the node, and returns
// what stands in the way of enforcing all of it.
func (d *Daemon) Once(ctx context.Context) ([]source.Problem, error) {
	d.upgrade(ctx)
	batch, err := d.opts.Source.Load(ctx)
	if err != nil {
		return nil, err
	}
	if d.nodeAddrs, err = nodeaddr.List(); err != nil {
		return nil, err
	}
	d.services.locate(d.nodeAddrs)
	d.setNodeAddresses(ctx)
	d.take(batch)
	d.repair(ctx)
	d.refresh(ctx)
	d.setServices(ctx)
	d.takeOver(ctx)
	if d.compiler.Pending() && !d.stale {
		d.apply(ctx, d.compiler.Compact())
	}
	d.report()
	return d.problems.list(), nil
}

// Run keeps the state up to date until ctx is done. It fails only when the
// source has no state to begin with.
func (d *Daemon) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	batches := make(chan source.Batch)
	g.Go(func() error {
		return d.opts.Source.Run(ctx, func(b source.Batch) { send(ctx, batches, b) })
	})
	addrs := make(chan []netip.Addr)
	failures := make(chan error)
	g.Go(func() error {
		d.followNode(ctx, addrs, failures)
		return nil
	})
	g.Go(func() error {
		d.loop(ctx, batches, addrs, failures)
		return nil
	})
	return g.Wait()
}

func send[T any](ctx context.Context, to chan<- T, what T) {
	select {
	case to <- what:
	case <-ctx.Done():
	}
}

// followNode follows the node's addresses for as long as ctx lasts.
func (d *Daemon) followNode(ctx context.Context, addrs chan<- []netip.Addr, failures chan<- error) {
	for ctx.Err() == nil {
		err := d.opts.NodeAddresses(ctx, d.log, func(a []netip.Addr) {
			send(ctx, failures, nil)
			send(ctx, addrs, a)
		})
		if ctx.Err() != nil {
			return
		}
		send(ctx, failures, fmt.Errorf("follow the node's addresses: %w", err))
		select {
		case <-ctx.Done():
		case <-time.After(d.opts.Retry):
		}
	}
}

// loop is the only goroutine that touches the daemon.
func (d *Daemon) loop(ctx context.Context, batches <-chan source.Batch, addrs <-chan []netip.Addr, failures <-chan error) {
	d.upgrade(ctx)
	d.measure(ctx)
	changes := d.watch(ctx)
	var (
		// Nothing is compiled before the source has said everything once:
		// what it has not said yet would look like gone.
		ready   bool
		compact <-chan time.Time
		retry   <-chan time.Time
		mend    <-chan time.Time
		tell    <-chan time.Time
		// The plugin of another version may be called until it is replaced.
		former <-chan time.Time
	)
	repair := time.NewTicker(d.opts.Repair)
	defer repair.Stop()
	for {
		moved := true
		select {
		case <-ctx.Done():
			return
		case b := <-batches:
			// There may be hundreds a second, and endpoints that have changed
			// since say so.
			moved = changes == nil
			d.take(b)
			ready = ready || !b.Lacks(source.PolicyKinds()...)
		case _, ok := <-changes:
			if !ok {
				changes = nil
			}
			// Perhaps a hook was lost; more likely a pod came or went. Repair
			// looks at every endpoint under the lock that ADD needs.
			if mend == nil {
				mend = time.After(time.Until(d.repaired.Add(d.opts.Grace)))
			}
		case <-mend:
			mend = nil
			d.repair(ctx)
		case <-former:
			d.inherit(ctx)
		case d.nodeAddrs = <-addrs:
			// Each pod's veth has one: all of them would fill the log.
			d.log.Info("addresses of the node", "count", len(d.nodeAddrs),
				"new", without(d.nodeAddrs, d.services.node), "gone", without(d.services.node, d.nodeAddrs))
			d.services.locate(d.nodeAddrs)
			d.setNodeAddresses(ctx)
		case err := <-failures:
			d.problems.set("node addresses", "node addresses", err)
		case <-repair.C:
			if changes == nil {
				changes = d.watch(ctx)
			}
			d.repair(ctx)
			d.measure(ctx)
			d.services.due = d.services.due || d.services.failed
		case <-retry:
		case <-tell:
			tell = nil
			d.report()
			continue
		case <-compact:
			compact, moved = nil, changes == nil
			if !d.stale {
				d.apply(ctx, d.compiler.Compact())
			}
		}
		d.moved = d.moved || moved
		if ready {
			d.refresh(ctx)
			retry = nil
			if d.stale || d.short && d.tries > 0 {
				retry = time.After(time.Until(d.tried.Add(d.retry)))
			}
			if compact == nil && d.compiler.Pending() {
				compact = time.After(d.opts.Grace)
			}
		}
		d.setServices(ctx)
		d.takeOver(ctx)
		if former = nil; d.former {
			former = time.After(d.opts.Grace)
		}
		// There may be hundreds of batches a second.
		if pause := time.Until(d.reported.Add(d.opts.Grace / 4)); pause <= 0 {
			tell = nil
			d.report()
		} else if tell == nil {
			tell = time.After(pause)
		}
	}
}

// without are the addresses that others do not have.
func without(addrs, others []netip.Addr) []netip.Addr {
	return slices.DeleteFunc(slices.Clone(addrs), func(a netip.Addr) bool { return slices.Contains(others, a) })
}

// watch follows the endpoints; without it changes show at the next repair.
func (d *Daemon) watch(ctx context.Context) <-chan struct{} {
	changes, err := d.opts.State.Watch(ctx)
	d.problems.set("watch", "endpoints", err)
	if err != nil {
		return nil
	}
	return changes
}

// take notes a batch.
func (d *Daemon) take(b source.Batch) {
	d.inventory.Apply(b)
	d.services.take(b)
	d.problems.replace("source", b.Problems)
	d.opts.Metrics.RevisionReceived()
	d.pending++
}

// refresh brings the state up to date with the objects noted and the endpoints
// there are.
func (d *Daemon) refresh(ctx context.Context) {
	if d.moved && !d.readEndpoints() {
		return
	}
	d.problems.replace("inventory", d.inventory.Update(d.compiler))
	d.bind(ctx)
	again := d.stale || d.short && d.tries > 0
	if again && time.Since(d.tried) >= d.retry {
		d.tries--
		d.retry = min(2*d.retry, d.opts.Repair)
		// What is retired may be what had no room.
		d.compiler.Compact()
		d.apply(ctx, d.compiler.Snapshot())
		return
	}
	if d.stale {
		return
	}
	update := d.compiler.Compile()
	switch {
	case !isEmpty(&update):
		d.apply(ctx, update)
	case !d.short:
		d.caughtUp()
	}
}

// isEmpty tells whether an update changes nothing.
func isEmpty(u *policy.Update) bool {
	return !u.Full && len(u.Policies)+len(u.Rules)+len(u.Rulesets)+len(u.Cells)+len(u.Classes)+len(u.Joins)+
		len(u.Peers)+len(u.Subjects)+len(u.GonePeers)+len(u.GoneSubjects)+len(u.GoneJoins)+len(u.GoneRulesets)+
		len(u.GoneClasses)+len(u.GoneRules)+len(u.GonePolicies) == 0
}

// readEndpoints reads the endpoints of the node and reports whether they are
// known. One that cannot be read stays as it was.
func (d *Daemon) readEndpoints() bool {
	before := make(map[pinning.AttachmentKey]pinning.Endpoint, len(d.endpoints))
	for _, ep := range d.endpoints {
		before[ep.Key] = ep
	}
	var (
		endpoints []pinning.Endpoint
		failed    []source.Problem
		complete  = true
	)
	for ep, err := range d.opts.State.Endpoints() {
		old, known := before[ep.Key]
		delete(before, ep.Key)
		switch {
		case err == nil:
			endpoints = append(endpoints, ep)
			continue
		case known:
			endpoints = append(endpoints, old)
		case ep.Key == pinning.AttachmentKey{}:
			complete = false
		}
		failed = append(failed, source.Problem{Subject: "endpoints", Reason: err.Error()})
	}
	if !complete {
		endpoints = slices.AppendSeq(endpoints, maps.Values(before))
	}
	d.listed = d.listed || complete
	d.endpoints, d.moved = endpoints, len(failed) > 0
	d.problems.replace("endpoints", failed)
	d.inventory.SetEndpoints(endpoints)
	return d.listed
}

// bind tells the state which pod each endpoint belongs to.
func (d *Daemon) bind(ctx context.Context) {
	bindings := d.inventory.Bindings()
	var failed []source.Problem
	for _, ep := range d.endpoints {
		pod, known := bindings[ep.Key]
		if !known || ep.Pod == pod {
			continue
		}
		d.moved = true
		if err := d.opts.State.Bind(ctx, ep.Key, pod); err != nil {
			failed = append(failed, source.Problem{Subject: "endpoint " + ep.Key.String(), Reason: err.Error()})
		}
	}
	d.problems.replace("bind", failed)
}

// apply hands an update to the state. After a failure the next one is the whole
// state. What found no room does not fail the rest: the state goes on from what
// it has.
func (d *Daemon) apply(ctx context.Context, update policy.Update) {
	began := time.Now()
	applied, err := d.opts.State.Apply(ctx, update)
	if ctx.Err() != nil {
		return
	}
	failed := applied.Problems
	if err != nil {
		failed = append(failed, err)
	}
	d.opts.Metrics.Applied(time.Since(began), len(failed) == 0)
	d.log.Info("applied", "full", update.Full, "rulesets", applied.Rulesets, "cells", applied.Cells,
		"peers", applied.Peers, "gates", applied.Gates, "problems", len(failed), "took", time.Since(began))
	wasShort := d.short
	d.stale, d.short = false, d.short && !update.Full
	for _, err := range failed {
		full := errors.Is(err, pinning.ErrFull)
		d.short = d.short || full
		d.stale = d.stale || !full
	}
	makesRoom := d.short && (!wasShort || makesRoom(&update))
	if makesRoom {
		d.tries, d.retry = roomTries, d.opts.Retry
	}
	switch {
	case update.Full, makesRoom, d.stale:
		d.tried = time.Now()
	}
	if !d.stale {
		d.applied = time.Now()
	}
	if !d.stale && !d.short {
		d.caughtUp()
	}
	d.blame(failed, d.short && !update.Full)
}

// roomTries is how often it is tried to write everything after something has
// gone: what goes makes room only when its time of grace is over.
const roomTries = 4

// makesRoom says whether an update takes something away that there are few of.
// Addresses come and go all the time.
func makesRoom(u *policy.Update) bool {
	isBlock := func(p policy.PeerKey) bool { return !p.Exact }
	return !u.Full && (len(u.GoneRulesets)+len(u.GoneClasses)+len(u.GoneRules)+len(u.GonePolicies)+len(u.GoneSubjects) > 0 ||
		slices.ContainsFunc(u.GonePeers, isBlock))
}

// blame names what could not be written. Of a state that goes on without
// something the problems from before stand; those of policies it names anew.
func (d *Daemon) blame(failed []error, stand bool) {
	var problems []source.Problem
	for _, err := range failed {
		var about *pinning.PolicyError
		if !errors.As(err, &about) {
			problems = append(problems, source.Problem{Subject: "kernel state", Reason: err.Error()})
			continue
		}
		for _, p := range about.Policies {
			out := source.Problem{Subject: strings.TrimPrefix(p.Kind+" "+p.Namespace+"/"+p.Name, " "), Reason: about.Err.Error()}
			if key, ok := d.inventory.Policy(p.UID); ok {
				out.Subject, out.Object = key.String(), key
			}
			problems = append(problems, out)
		}
	}
	if stand {
		for _, p := range d.problems.standing["apply"] {
			p.Since = time.Time{}
			if p.Subject == "kernel state" {
				problems = append(problems, p)
			}
		}
	}
	d.problems.replace("apply", problems)
}

// caughtUp notes that the state has everything the daemon knows.
func (d *Daemon) caughtUp() {
	d.synced, d.retry = time.Now(), d.opts.Retry
	d.opts.Metrics.RevisionsApplied(d.pending)
	d.pending = 0
}

// setNodeAddresses tells the state the node's addresses; repair does so again
// if it fails.
func (d *Daemon) setNodeAddresses(ctx context.Context) {
	err := d.opts.State.SetNodeAddresses(ctx, d.nodeAddrs)
	d.problems.set("set node addresses", "node addresses", err)
	if err == nil {
		d.nodeAddrs = nil
	}
}

func (d *Daemon) upgrade(ctx context.Context) {
	upgraded, err := d.opts.State.Upgrade(ctx)
	d.problems.set("upgrade", "programs", err)
	if upgraded {
		d.log.Info("programs upgraded on every attachment")
	}
	d.inherit(ctx)
}

// inherit makes the endpoints of another version known here.
func (d *Daemon) inherit(ctx context.Context) {
	there, err := d.opts.State.Inherit(ctx)
	if there && !d.former {
		d.log.Info("another version has gated pods: they are taken over when their policy is known")
	}
	d.former = there
	d.problems.set("inherit", "endpoints of another version", err)
}

// takeOver takes endpoints over from another version, once all is applied that
// decides about them.
func (d *Daemon) takeOver(ctx context.Context) {
	if !d.former || d.stale || d.synced.IsZero() || d.nodeAddrs != nil || !d.services.known || d.services.due {
		return
	}
	var err error
	d.former, err = d.opts.State.TakeOver(ctx)
	d.moved = true
	d.problems.set("take over", "endpoints of another version", err)
}

// repair puts back what was lost.
func (d *Daemon) repair(ctx context.Context) {
	d.inherit(ctx)
	repaired, err := d.opts.State.Repair(ctx)
	for _, r := range repaired {
		d.log.Warn("repaired", "what", r)
	}
	if d.nodeAddrs != nil {
		d.setNodeAddresses(ctx)
	}
	d.repaired = time.Now()
	d.opts.Metrics.Repaired(len(repaired))
	d.problems.set("repair", "attachments", err)
}

func (d *Daemon) report() {
	s := status.Status{
		Updated:   time.Now(),
		Synced:    d.synced,
		Applied:   d.applied,
		Endpoints: len(d.endpoints),
		Problems:  d.problems.list(),
	}
	s.Policies, s.Pods, s.Namespaces = d.inventory.Counts()
	d.opts.Metrics.Report(s, d.states(), d.fill.usage)
	d.opts.Report(s)
	d.reported = time.Now()
}
