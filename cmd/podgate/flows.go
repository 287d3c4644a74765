// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/podgate/podgate/bpf/flow"
	"github.com/podgate/podgate/bpf/policy"
	"github.com/podgate/podgate/pinning"
)

// flowReport is an event with the names of what it is about.
type flowReport struct {
	Time      time.Time `json:"time,omitzero"`
	Verdict   string    `json:"verdict"`
	Direction string    `json:"direction"`
	Reason    string    `json:"reason"`
	// Pod is the endpoint's side, Peer the other one's name if it has one.
	Pod          string     `json:"pod,omitempty"`
	Attachment   string     `json:"attachment,omitempty"`
	Peer         string     `json:"peer,omitempty"`
	LocalAddress netip.Addr `json:"localAddress"`
	PeerAddress  netip.Addr `json:"peerAddress"`
	// Service that was asked for, Frontend where, and Backend that it was
	// translated to, as far as they are not the peer and known.
	Service   string         `json:"service,omitempty"`
	Frontend  netip.AddrPort `json:"frontend,omitzero"`
	Backend   netip.AddrPort `json:"backend,omitzero"`
	LocalPort uint16         `json:"localPort,omitempty"`
	PeerPort  uint16         `json:"peerPort,omitempty"`
	Protocol  string         `json:"protocol"`
	Detail    string         `json:"detail,omitempty"`
	Policy    string         `json:"policy,omitempty"`
	Rule      string         `json:"rule,omitempty"`
	Length    uint32         `json:"length,omitempty"`
	// State and counters are those of a tracked flow, by direction.
	State   string     `json:"state,omitempty"`
	Packets *[2]uint64 `json:"packets,omitempty"`
	Bytes   *[2]uint64 `json:"bytes,omitempty"`
}

func (a *app) flowsCommand() *cobra.Command {
	var (
		f      flowFilter
		follow bool
	)
	cmd := &cobra.Command{
		Use:   "flows",
		Short: "Show new flows and drops, with the rule that decided",
		Long: `Prints the events of the datapath: the first packet of each flow, and packets
that were dropped, or would have been in audit mode. With --follow it goes on as
they come. Events are read once: whoever reads them takes them. While "podgate
observe" runs it has read them, and is asked for what it remembers.`,
		Example: `  podgate flows --follow --verdict denied
  podgate flows --pod shop/web --direction ingress -o json
  podgate flows list --pod shop/web`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.flows(cmd.Context(), f, follow)
		},
	}
	f.register(a, cmd)
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on until interrupted")
	cmd.AddCommand(a.flowsListCommand())
	return cmd
}

func (a *app) flowsListCommand() *cobra.Command {
	var f flowFilter
	cmd := &cobra.Command{
		Use:   "list",
		Short: "Show the flows that are tracked now",
		Long: `Prints the connection table: every flow that the datapath tracks, with its state,
the rule that allows it and its packets.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.listFlows(cmd.Context(), f) },
	}
	f.register(a, cmd)
	return cmd
}

// describer turns numbers into names. Rules are looked up once.
type describer struct {
	state     *pinning.State
	endpoints map[uint32]pinning.Endpoint
	names     map[netip.Addr]string
	rules     map[uint32]pinning.Rule
}

// describe starts a describer. Names of pods elsewhere are those of the daemon's
// manifests; without them addresses do.
func (a *app) describe(ctx context.Context, state *pinning.State) *describer {
	d := &describer{state: state, rules: make(map[uint32]pinning.Rule), names: make(map[netip.Addr]string)}
	if q, err := a.questions(ctx, manifestFlags{}); err == nil {
		for _, p := range q.Pods() {
			for _, addr := range p.Addresses {
				d.names[addr] = p.Name
			}
		}
		if err := q.close(); err != nil {
			a.logger().Warn("close", "error", err)
		}
	}
	d.readEndpoints()
	return d
}

func (d *describer) readEndpoints() {
	d.endpoints = make(map[uint32]pinning.Endpoint)
	for ep, err := range d.state.Endpoints() {
		if err != nil {
			continue // its flows go without a name
		}
		d.endpoints[ep.ID] = ep
		for _, addr := range ep.Addresses {
			d.names[addr] = endpointName(&ep)
		}
	}
}

// endpoint names an endpoint; one that is new is looked for.
func (d *describer) endpoint(id uint32, r *flowReport) {
	ep, ok := d.endpoints[id]
	if !ok {
		d.readEndpoints()
		if ep, ok = d.endpoints[id]; !ok {
			d.endpoints[id] = pinning.Endpoint{}
		}
	}
	if ep.ID != 0 {
		r.Pod, r.Attachment = endpointName(&ep), ep.Key.String()
	}
}

func (d *describer) rule(id uint32, r *flowReport) {
	if id == 0 {
		return
	}
	rule, ok := d.rules[id]
	if !ok {
		rule, _ = d.state.Rule(id) // a rule that is gone has no name
		d.rules[id] = rule
	}
	if rule.ID == 0 || rule.Policy.Name == "" {
		return
	}
	r.Policy, r.Rule = rule.Policy.String(), rule.Text
	if rule.Index < 0 {
		r.Rule = isolatedText
	}
}

func (d *describer) event(f flow.Flow) flowReport {
	r := flowReport{
		Time: f.Time, Verdict: f.Verdict.String(), Direction: f.Direction.String(), Reason: f.Reason.String(),
		LocalAddress: f.Local.Addr(), PeerAddress: f.Peer.Addr(), LocalPort: f.Local.Port(), PeerPort: f.Peer.Port(),
		Protocol: protocolName(f.Protocol), Length: f.Length, Peer: d.names[f.Peer.Addr()],
	}
	switch f.Protocol {
	case policy.TCP:
		r.Detail = tcpFlags(f.TCPFlags)
	case policy.ICMP, policy.ICMPv6:
		r.Detail = icmpDetail(uint32(f.ICMPType), uint32(f.ICMPCode))
	}
	if f.EtherType != etherIPv4 && f.EtherType != etherIPv6 {
		r.Protocol = etherName(f.EtherType)
	}
	if r.Frontend = f.Frontend; f.Frontend.IsValid() {
		r.Service = d.service(f.Frontend, f.Protocol)
	} else if f.Direction == policy.Egress {
		r.Service = d.service(f.Peer, f.Protocol)
	}
	d.endpoint(f.Endpoint, &r)
	d.rule(f.Rule, &r)
	return r
}

// isolatedText stands for a rule where none matched.
const isolatedText = "isolated, no rule matched"

func icmpDetail(kind, code uint32) string { return fmt.Sprintf("type %d code %d", kind, code) }

// service names the Service at an address.
func (d *describer) service(at netip.AddrPort, p policy.Protocol) string {
	s, err := d.state.ServiceAt(at, p)
	if err != nil {
		return "" // none, or gone meanwhile
	}
	return s.String()
}

func (d *describer) entry(f *pinning.FlowEntry) flowReport {
	r := flowReport{
		Verdict: f.Verdict.String(), Direction: f.Direction.String(), Reason: f.Reason.String(), State: f.State.String(),
		LocalAddress: f.Local.Addr(), PeerAddress: f.Peer.Addr(), LocalPort: f.Local.Port(), PeerPort: f.Peer.Port(),
		Protocol: protocolName(f.Protocol), Peer: d.names[f.Peer.Addr()], Packets: &f.Packets, Bytes: &f.Bytes,
	}
	if f.Direction == policy.Egress {
		r.Service = d.service(f.Peer, f.Protocol)
	}
	if r.Backend = f.Backend; f.Backend.IsValid() {
		r.Peer = d.names[f.Backend.Addr()]
	}
	d.endpoint(f.Endpoint, &r)
	d.rule(f.Rule, &r)
	return r
}

// quiet is how long the ring may say nothing before all there was is read. A
// ring that never rests is read up to what came after the command.
const quiet = 150 * time.Millisecond

func (a *app) flows(ctx context.Context, f flowFilter, follow bool) (err error) {
	if err := f.parse(); err != nil {
		return err
	}
	state, err := a.open(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, state.Close()) }()
	events, err := state.Events(ctx)
	if errors.Is(err, pinning.ErrLocked) {
		return a.observedFlows(ctx, f, follow, err)
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, events.Close()) }()
	before, err := events.Lost()
	if err != nil {
		return err
	}
	d := a.describe(ctx, state)
	began := time.Now()
	for {
		reading, cancel := ctx, context.CancelFunc(func() {})
		if !follow {
			reading, cancel = context.WithTimeout(ctx, quiet)
		}
		event, err := events.Read(reading)
		cancel()
		switch {
		case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
			return a.reportLost(events, before)
		case errors.Is(err, flow.ErrTruncated):
			a.logger().Warn("event left out", "error", err)
			continue
		case err != nil:
			return err
		}
		if r := d.event(event); f.matches(&r) {
			if err := a.writeFlow(&r); err != nil {
				return err
			}
		}
		if !follow && event.Time.After(began) {
			return a.reportLost(events, before)
		}
	}
}

func (a *app) reportLost(events *flow.Reader, before uint64) error {
	lost, err := events.Lost()
	if err == nil && lost > before {
		a.complain("podgate: %s were lost: the ring was full\n", plural(int(lost-before), "event", "events"))
	}
	return err
}

// writeFlow prints one event; JSON is one object a line.
func (a *app) writeFlow(r *flowReport) error {
	if a.output == outputJSON {
		return json.NewEncoder(a.Stdout).Encode(r)
	}
	styles := map[string]style{flow.Denied.String(): red, flow.Allowed.String(): green, flow.Audited.String(): yellow}
	local, peer := endOf(r.Pod, r.LocalAddress, r.LocalPort), r.peerEnd()
	from, to := peer, local
	if r.Direction == policy.Egress.String() {
		from, to = local, peer
	}
	why := r.Reason
	if r.Policy != "" {
		why = r.Policy + ": " + r.Rule
	}
	line := []string{
		a.paint(faint, r.Time.Local().Format("15:04:05.000")),
		a.paint(styles[r.Verdict], fmt.Sprintf("%-7s", r.Verdict)),
		fmt.Sprintf("%-7s", r.Direction),
		from, "->", to, strings.TrimSpace(r.Protocol + " " + r.Detail), a.paint(faint, "("+why+")"),
	}
	_, err := fmt.Fprintln(a.Stdout, strings.Join(line, " "))
	return err
}

// peerEnd is the peer with the way to it.
func (r *flowReport) peerEnd() string {
	switch peer := endOf(r.Peer, r.PeerAddress, r.PeerPort); {
	case r.Frontend.IsValid():
		return peer + " over " + endOf(r.serviceName(), r.Frontend.Addr(), r.Frontend.Port())
	case r.Backend.IsValid():
		return endOf(r.Peer, r.Backend.Addr(), r.Backend.Port()) + " over " + endOf(r.serviceName(), r.PeerAddress, r.PeerPort)
	case r.Service != "":
		return endOf(r.serviceName(), r.PeerAddress, r.PeerPort)
	default:
		return peer
	}
}

func (r *flowReport) serviceName() string {
	if r.Service == "" {
		return ""
	}
	return "service " + r.Service
}

// endOf is a name with the address behind it.
func endOf(name string, addr netip.Addr, port uint16) string {
	text := addr.String()
	if port != 0 {
		text = netip.AddrPortFrom(addr, port).String()
	}
	if name == "" {
		return text
	}
	return name + " " + text
}

func (a *app) listFlows(ctx context.Context, f flowFilter) (err error) {
	if err := f.parse(); err != nil {
		return err
	}
	state, err := a.open(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, state.Close()) }()
	d := a.describe(ctx, state)
	flows := []flowReport{}
	for entry, err := range state.Flows() {
		if err != nil {
			return err
		}
		if r := d.entry(&entry); r.Pod != "" && f.matches(&r) {
			flows = append(flows, r)
		}
	}
	slices.SortFunc(flows, func(a, b flowReport) int {
		return cmp.Or(cmp.Compare(a.Pod, b.Pod), a.PeerAddress.Compare(b.PeerAddress),
			cmp.Compare(a.Protocol, b.Protocol), cmp.Compare(a.PeerPort, b.PeerPort), cmp.Compare(a.LocalPort, b.LocalPort))
	})
	return a.print(flows, func(w *bytes.Buffer) {
		rows := [][]cell{row("POD", "DIRECTION", "PROTOCOL", "LOCAL", "PEER", "STATE", "IN", "OUT", "ALLOWED BY")}
		for i := range flows {
			r := &flows[i]
			by := r.Reason
			if r.Policy != "" {
				by = r.Policy
			}
			rows = append(rows, row(r.Pod, r.Direction, r.Protocol, endOf("", r.LocalAddress, r.LocalPort),
				r.peerEnd(), r.State,
				fmt.Sprint(r.Packets[policy.Ingress]), fmt.Sprint(r.Packets[policy.Egress]), by))
		}
		a.table(w, rows)
	})
}
