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
	"slices"
	"time"

	flowpb "github.com/cilium/cilium/api/v1/flow"
	observerpb "github.com/cilium/cilium/api/v1/observer"

	"github.com/podgate/podgate/bpf/policy"
)

// usageReport is what podgate policy --usage prints.
type usageReport struct {
	// Unused are rules that no packet has matched.
	Unused []unusedRule `json:"unused"`
	// Attempts were refused, or would have been, for want of a rule. Nil if
	// nobody remembers any.
	Attempts []attempt `json:"attempts"`
}

type unusedRule struct {
	Policy    string `json:"policy"`
	Direction string `json:"direction"`
	Index     int    `json:"index"`
	Text      string `json:"text"`
}

// attempt is what several events have in common.
type attempt struct {
	Direction string `json:"direction"`
	Pod       string `json:"pod"`
	Peer      string `json:"peer"`
	Protocol  string `json:"protocol"`
	// Port that was asked for; 0 if the protocol has none.
	Port    uint16    `json:"port,omitempty"`
	Verdict string    `json:"verdict"`
	Policy  string    `json:"policy"`
	Count   int       `json:"count"`
	Last    time.Time `json:"last"`
}

// policyUsage reports on all policies, or on those of some pods.
func (a *app) policyUsage(ctx context.Context, args []string) error {
	reports, err := a.policyReports(ctx, args)
	if err != nil {
		return err
	}
	r := usageReport{Unused: unusedRules(reports)}
	pods := make(map[string]struct{})
	for i := range reports {
		pods[reports[i].Endpoint] = struct{}{}
	}
	r.Attempts, err = a.attempts(ctx, func(pod string) bool {
		_, ok := pods[pod]
		return ok || len(args) == 0
	})
	if err != nil && !errors.Is(err, errNoObserver) {
		return err
	}
	return a.print(r, func(w *bytes.Buffer) { a.writeUsage(w, &r) })
}

func unusedRules(reports []policyReport) []unusedRule {
	out := []unusedRule{}
	for i := range reports {
		for direction, d := range map[policy.Direction]*directionReport{policy.Ingress: &reports[i].Ingress, policy.Egress: &reports[i].Egress} {
			for _, member := range d.Policies {
				for _, rule := range member.Rules {
					if rule.Packets == 0 {
						out = append(out, unusedRule{member.Policy, direction.String(), rule.Index, rule.Text})
					}
				}
			}
		}
	}
	slices.SortFunc(out, func(a, b unusedRule) int {
		return cmp.Or(cmp.Compare(a.Policy, b.Policy), cmp.Compare(a.Direction, b.Direction), cmp.Compare(a.Index, b.Index))
	})
	return slices.Compact(out) // a rule counts for all its endpoints together
}

// attempts adds up what podgate observe remembers.
func (a *app) attempts(ctx context.Context, about func(pod string) bool) ([]attempt, error) {
	sums := make(map[attempt]attempt)
	err := a.askObserver(ctx, &observerpb.GetFlowsRequest{Whitelist: []*flowpb.FlowFilter{{
		Verdict: []flowpb.Verdict{flowpb.Verdict_DROPPED, flowpb.Verdict_AUDIT},
	}}}, func(seen *flowpb.Flow) error {
		r := observedReport(seen)
		if r.Rule != isolatedText || !about(r.Pod) {
			return nil
		}
		key := attempt{
			Direction: r.Direction, Pod: r.Pod, Peer: cmp.Or(r.Peer, r.PeerAddress.String()), Protocol: r.Protocol,
			Port: r.PeerPort, Verdict: r.Verdict, Policy: r.Policy,
		}
		if r.Direction == policy.Ingress.String() {
			key.Port = r.LocalPort
		}
		sum := sums[key]
		if sum.Count == 0 {
			sum = key
		}
		sum.Count++
		if r.Time.After(sum.Last) {
			sum.Last = r.Time
		}
		sums[key] = sum
		return nil
	})
	if err != nil {
		return nil, err
	}
	out := []attempt{}
	for _, sum := range sums {
		out = append(out, sum)
	}
	slices.SortFunc(out, func(a, b attempt) int {
		return cmp.Or(cmp.Compare(b.Count, a.Count), cmp.Compare(a.Pod, b.Pod), cmp.Compare(a.Peer, b.Peer), cmp.Compare(a.Protocol, b.Protocol),
			cmp.Compare(a.Port, b.Port), cmp.Compare(a.Direction, b.Direction), cmp.Compare(a.Verdict, b.Verdict))
	})
	return out, nil
}

func (a *app) writeUsage(w *bytes.Buffer, r *usageReport) {
	if len(r.Unused) == 0 {
		fmt.Fprintln(w, "Every rule in force has matched packets.")
	} else {
		rows := [][]cell{row("POLICY", "DIRECTION", "RULE", "THAT NOTHING MATCHED")}
		for _, u := range r.Unused {
			rows = append(rows, row(u.Policy, u.Direction, fmt.Sprint(u.Index), u.Text))
		}
		a.table(w, rows)
	}
	fmt.Fprintln(w)
	switch {
	case r.Attempts == nil:
		fmt.Fprintln(w, "Nobody remembers what was denied: podgate observe does not run.")
	case len(r.Attempts) == 0:
		fmt.Fprintln(w, "Nothing was denied for want of a rule.")
	default:
		styles := map[string]style{"denied": red, "audited": yellow}
		rows := [][]cell{row("NO RULE ALLOWS", "OF", "WITH", "ON", "VERDICT", "TIMES", "LAST", "ISOLATED BY")}
		for _, t := range r.Attempts {
			on := t.Protocol
			if t.Port != 0 {
				on = fmt.Sprintf("%d/%s", t.Port, t.Protocol)
			}
			cells := row(t.Direction, t.Pod, t.Peer, on, t.Verdict, fmt.Sprint(t.Count), a.ago(t.Last), t.Policy)
			cells[4].style = styles[t.Verdict]
			rows = append(rows, cells)
		}
		a.table(w, rows)
	}
}
