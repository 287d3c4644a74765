// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/podgate/podgate/bpf/policy"
	"github.com/podgate/podgate/pinning"
	"github.com/podgate/podgate/syncd/source"
	"github.com/podgate/podgate/syncd/status"
)

// statusReport is what podgate status prints.
type statusReport struct {
	Version   string           `json:"version"`
	Instance  string           `json:"instance"`
	ABI       int              `json:"abi"`
	Daemon    *daemonReport    `json:"daemon,omitempty"`
	Endpoints []endpointReport `json:"endpoints"`
	// Services is how packets to them are judged.
	Services serviceReport      `json:"services"`
	Drops    []dropReport       `json:"drops"`
	Maps     []pinning.MapUsage `json:"maps"`
	Problems []source.Problem   `json:"problems"`
}

type serviceReport struct {
	Judged    string `json:"judged"`
	Frontends int    `json:"frontends"`
}

type daemonReport struct {
	Running bool `json:"running"`
	status.Status
}

type endpointReport struct {
	// Name is that of the pod, or of the container.
	Name       string                `json:"name"`
	Attachment pinning.AttachmentKey `json:"attachment"`
	PodUID     string                `json:"podUID,omitempty"`
	Labels     map[string]string     `json:"labels,omitempty"`
	// Subject is the pod whose policy the endpoint follows.
	Subject   policy.PodKey `json:"subject,omitempty"`
	Addresses []netip.Addr  `json:"addresses"`
	MAC       string        `json:"mac"`
	Network   string        `json:"network"`
	NetNS     string        `json:"netns"`

	ID            uint32    `json:"id"`
	Gate          uint32    `json:"gate"`
	HostIfindex   int       `json:"hostIfindex"`
	HostInterface string    `json:"hostInterface,omitempty"`
	Attach        string    `json:"attach"`
	Mode          string    `json:"mode"`
	AntiSpoof     bool      `json:"antiSpoof"`
	Audit         bool      `json:"audit"`
	Created       time.Time `json:"created"`

	State    string                   `json:"state"`
	Rulesets rulesetNumbers           `json:"rulesets"`
	Counters pinning.EndpointCounters `json:"counters"`
}

type rulesetNumbers struct {
	Ingress uint32 `json:"ingress"`
	Egress  uint32 `json:"egress"`
}

type dropReport struct {
	Reason    string `json:"reason"`
	Direction string `json:"direction"`
	pinning.Counter
}

func (a *app) statusCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "status",
		Short: "Show endpoints, what is enforced, how full the maps are, and problems",
		Long: `Shows the endpoints of this node and their state, the daemon, what was dropped
and why, how full the maps are, and everything that is wrong.

An endpoint is enforcing when policy isolates it in some direction, open when
none does, closed when its policy is not known yet.

Exit code 2 if there are problems.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			report, err := a.statusReport(cmd.Context())
			if err != nil {
				return err
			}
			if err := a.print(report, func(w *bytes.Buffer) { a.writeStatus(w, report) }); err != nil {
				return err
			}
			if len(report.Problems) > 0 {
				return errProblem
			}
			return nil
		},
	}
}

func (a *app) statusReport(ctx context.Context) (*statusReport, error) {
	state, err := a.open(ctx)
	if err != nil {
		return nil, err
	}
	defer state.Close()
	r := &statusReport{
		Version: version, Instance: a.layout.Dir(), ABI: pinning.ABI,
		Endpoints: []endpointReport{}, Drops: []dropReport{}, Problems: []source.Problem{},
	}
	r.problem("instance", state.Ready(ctx))
	if err := a.addDaemon(r); err != nil {
		return nil, err
	}
	for ep, err := range state.Endpoints() {
		if err != nil {
			r.problem("endpoint "+ep.Key.String(), err)
			continue
		}
		a.addEndpoint(ctx, r, state, ep)
	}
	services, err := state.ServiceState()
	r.problem("services", err)
	r.Services = serviceReport{services.Mode.String(), services.Frontends}
	slices.SortFunc(r.Endpoints, func(a, b endpointReport) int {
		return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.ID, b.ID))
	})
	drops, err := state.DropCounters()
	if err != nil {
		return nil, err
	}
	for _, d := range drops {
		r.Drops = append(r.Drops, dropReport{d.Reason.String(), d.Direction.String(), d.Counter})
	}
	if r.Maps, err = state.Usage(); err != nil {
		return nil, err
	}
	for _, m := range r.Maps {
		if full := m.Full(); full >= pinning.FillWarning {
			r.problem("map "+m.Name, fmt.Errorf("%d%% full (%d of %d entries): %s; set the instance up anew with more capacity", full, m.Used, m.Max, m.Consequence()))
		}
	}
	return r, nil
}

func (r *statusReport) problem(subject string, err error) {
	if err != nil {
		r.Problems = append(r.Problems, source.Problem{Subject: subject, Reason: err.Error()})
	}
}

// addDaemon reports the daemon, and its problems as ours.
func (a *app) addDaemon(r *statusReport) error {
	s, running, err := a.daemon()
	if err != nil {
		return err
	}
	if s == nil {
		if !running {
			r.problem("daemon", errors.New(`podgate sync has never run: endpoints stay as ADD left them`))
		}
		return nil
	}
	r.Daemon = &daemonReport{running, *s}
	silence := a.Now().Sub(s.Updated)
	switch {
	case !running && !s.Once:
		r.problem("daemon", errors.New(`podgate sync is not running: what it applied stays in force, changes do not arrive`))
	case running && silence > 3*status.Interval:
		r.problem("daemon", fmt.Errorf("podgate sync (PID %d) has said nothing for %s: it hangs, or cannot write %s", s.PID, silence.Round(time.Second), a.runDirectory()))
	}
	r.Problems = append(r.Problems, s.Problems...)
	return nil
}

// patience is how long an endpoint may wait for its policy before that is a
// problem.
const patience = 10 * time.Second

func (a *app) addEndpoint(ctx context.Context, r *statusReport, state *pinning.State, ep pinning.Endpoint) {
	e := endpointReport{
		Name: endpointName(&ep), Attachment: ep.Key, PodUID: ep.PodUID, Labels: ep.Labels, Subject: ep.Pod,
		Addresses: ep.Addresses, MAC: ep.MAC.String(), Network: ep.Network, NetNS: ep.NetNS,
		ID: ep.ID, Gate: ep.Gate, HostIfindex: ep.HostIfindex, Attach: ep.Attach.String(), Mode: ep.Mode.String(),
		AntiSpoof: ep.AntiSpoof, Created: ep.Created,
	}
	if link, err := net.InterfaceByIndex(ep.HostIfindex); err == nil {
		e.HostInterface = link.Name
	}
	subject := "endpoint " + e.Name
	enforced, err := state.Enforcement(ep)
	if err == nil {
		e.Audit, err = state.Audited(ep)
	}
	r.problem(subject, err)
	e.State, e.Rulesets = enforced.State(), rulesetNumbers{enforced.Ingress, enforced.Egress}
	if e.State == "closed" && a.Now().Sub(ep.Created) > patience {
		r.problem(subject, errors.New("closed: its policy is not known"))
	}
	e.Counters, err = state.Counters(ep.Gate)
	r.problem(subject, err)
	r.problem(subject, state.Check(ctx, ep.Key, ep))
	r.Endpoints = append(r.Endpoints, e)
}

// endpointName is that of its pod, or of its container.
func endpointName(ep *pinning.Endpoint) string {
	if ep.PodName != "" {
		return cmp.Or(ep.PodNamespace, "default") + "/" + ep.PodName
	}
	return shortID(ep.Key.ContainerID)
}

// shortID is as much of a container ID as container tools print.
func shortID(id string) string {
	const short = 12
	return id[:min(short, len(id))]
}

func (a *app) writeStatus(w *bytes.Buffer, r *statusReport) {
	fmt.Fprintf(w, "podgate %s, instance %s, pinned layout v%d\n", r.Version, r.Instance, r.ABI)
	if d := r.Daemon; d != nil {
		running := a.paint(red, "not running")
		switch {
		case d.Running:
			running = a.paint(green, "running") + fmt.Sprintf(" (PID %d, version %s, for %s)", d.PID, d.Version, a.ago(d.Started))
		case d.Once:
			running = "ran once (version " + d.Version + ")"
		}
		fmt.Fprintf(w, "sync %s\n", running)
		fmt.Fprintf(w, "     policy from %s, synced %s: %s, %s, %s\n", cmp.Or(d.APIServer, d.PolicyDir), when(a.ago(d.Synced)),
			plural(d.Policies, "policy", "policies"), plural(d.Pods, "pod", "pods"), plural(d.Namespaces, "namespace", "namespaces"))
	}

	if s := r.Services; s.Frontends > 0 {
		fmt.Fprintf(w, "services: %s, judged %s\n", plural(s.Frontends, "frontend", "frontends"), s.Judged)
	}

	fmt.Fprintln(w)
	if len(r.Endpoints) == 0 {
		fmt.Fprintln(w, "no endpoints")
	} else {
		rows := [][]cell{row("ENDPOINT", "INTERFACE", "ADDRESSES", "STATE", "ATTACHED", "MODE", "ALLOWED", "DROPPED")}
		for i := range r.Endpoints {
			rows = append(rows, a.endpointRow(&r.Endpoints[i]))
		}
		a.table(w, rows)
	}
	if len(r.Drops) > 0 {
		fmt.Fprintln(w)
		rows := [][]cell{row("DROPPED BECAUSE", "DIRECTION", "PACKETS", "BYTES")}
		for _, d := range r.Drops {
			rows = append(rows, row(d.Reason, d.Direction, fmt.Sprint(d.Packets), size(d.Bytes)))
		}
		a.table(w, rows)
	}
	fmt.Fprintln(w)
	rows := [][]cell{row("MAP", "USED", "MAX", "FULL", "MEMORY")}
	for _, m := range r.Maps {
		used, full := "-", cell{text: "-"}
		if percent := m.Full(); percent >= 0 {
			used, full.text = fmt.Sprint(m.Used), fmt.Sprintf("%d%%", percent)
			switch {
			case percent < pinning.FillWarning:
			case percent < pinning.FillUrgent:
				full.style = yellow
			default:
				full.style = red
			}
		}
		rows = append(rows, append(append(row(m.Name, used, fmt.Sprint(m.Max)), full), row(size(m.Bytes))...))
	}
	a.table(w, rows)
	a.writeProblems(w, r.Problems)
}

func (a *app) writeProblems(w *bytes.Buffer, problems []source.Problem) {
	if len(problems) == 0 {
		return
	}
	fmt.Fprintf(w, "\n%s\n", a.paint(red, plural(len(problems), "PROBLEM", "PROBLEMS")))
	for _, p := range problems {
		since := ""
		if !p.Since.IsZero() {
			since = a.paint(faint, " ("+a.ago(p.Since)+")")
		}
		fmt.Fprintf(w, "  %s%s%s\n", a.paint(bold, p.Subject), complaint(p), since)
	}
}

// complaint is what follows the subject of a problem. That of a file goes on
// with the line.
func complaint(p source.Problem) string {
	if line, ok := strings.CutPrefix(p.Reason, p.Subject+":"); ok {
		return ":" + line
	}
	return ": " + p.Reason
}

func (a *app) endpointRow(e *endpointReport) []cell {
	styles := map[string]style{"enforcing": green, "closed": yellow}
	modes := []string{e.Mode}
	if e.Audit {
		modes = append(modes, "audit")
	}
	if !e.AntiSpoof {
		modes = append(modes, "spoofing")
	}
	var addresses []string
	for _, addr := range e.Addresses {
		if !addr.IsLinkLocalUnicast() {
			addresses = append(addresses, addr.String())
		}
	}
	c := e.Counters
	return []cell{
		{text: e.Name}, {text: cmp.Or(e.HostInterface, fmt.Sprintf("#%d", e.HostIfindex))},
		{text: strings.Join(addresses, " ")}, {e.State, styles[e.State]}, {text: e.Attach},
		{text: strings.Join(modes, ",")},
		{text: fmt.Sprint(c.AllowedPackets[0] + c.AllowedPackets[1])}, {text: fmt.Sprint(c.DroppedPackets[0] + c.DroppedPackets[1])},
	}
}

func plural(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}

// when makes a point in time of an age.
func when(age string) string {
	if age == "now" || age == "never" {
		return age
	}
	return age + " ago"
}
