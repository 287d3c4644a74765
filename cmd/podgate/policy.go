// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/podgate/podgate/bpf/policy"
	"github.com/podgate/podgate/pinning"
)

// policyReport is what is enforced on an endpoint.
type policyReport struct {
	Endpoint   string                `json:"endpoint"`
	Attachment pinning.AttachmentKey `json:"attachment"`
	Audit      bool                  `json:"audit"`
	Ingress    directionReport       `json:"ingress"`
	Egress     directionReport       `json:"egress"`
}

// directionReport is a ruleset in terms of policies.
type directionReport struct {
	// State is open, closed or enforcing.
	State    string         `json:"state"`
	Ruleset  uint32         `json:"ruleset"`
	Default  string         `json:"default,omitempty"`
	Policies []memberReport `json:"policies,omitempty"`
}

type memberReport struct {
	Policy string       `json:"policy"`
	Rules  []ruleReport `json:"rules"`
	// Isolation counts what no rule matched, in the policy it is put down to.
	Isolation *pinning.Counter `json:"isolation,omitempty"`
}

type ruleReport struct {
	Index  int    `json:"index"`
	Action string `json:"action"`
	Text   string `json:"text"`
	pinning.Counter
}

func (a *app) policyCommand() *cobra.Command {
	var usage bool
	cmd := &cobra.Command{
		Use:   "policy [POD | CONTAINER]...",
		Short: "Show what is enforced on endpoints, rule by rule, with counters",
		Long: `Shows the policies that are in force on each endpoint, or on those of the pods
(namespace/name) or containers named, as the kernel has them: rule by rule, with
the packets each has judged. Counters of a rule are those of all its endpoints.

With --usage it shows instead which rules no packet has matched since they were
pinned, and what was denied, or would have been under audit, because no rule
allows it: as far as podgate observe remembers.`,
		Example: `  podgate policy shop/web
  podgate policy --usage`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if usage {
				return a.policyUsage(cmd.Context(), args)
			}
			reports, err := a.policyReports(cmd.Context(), args)
			if err != nil {
				return err
			}
			return a.print(reports, func(w *bytes.Buffer) { a.writePolicy(w, reports) })
		},
		ValidArgsFunction: a.completeEndpoints,
	}
	cmd.Flags().BoolVar(&usage, "usage", false, "show rules that nothing matched, and attempts that no rule allows")
	return cmd
}

func (a *app) completeEndpoints(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
	state, err := a.open(cmd.Context())
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	defer state.Close()
	var names []string
	for ep, err := range state.Endpoints() {
		if err == nil {
			names = append(names, endpointName(&ep))
		}
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

// names tells whether an argument means an endpoint.
func names(arg string, ep *pinning.Endpoint) bool {
	if ep.PodName != "" {
		namespace := cmp.Or(ep.PodNamespace, "default")
		if arg == namespace+"/"+ep.PodName || namespace == "default" && arg == ep.PodName {
			return true
		}
	}
	const least = 4
	return len(arg) >= least && strings.HasPrefix(ep.Key.ContainerID, arg)
}

func (a *app) policyReports(ctx context.Context, args []string) ([]policyReport, error) {
	state, err := a.open(ctx)
	if err != nil {
		return nil, err
	}
	defer state.Close()
	rules, err := pinnedRules(state)
	if err != nil {
		return nil, err
	}
	reports := []policyReport{}
	found := make(map[string]bool)
	for ep, err := range state.Endpoints() {
		if err != nil {
			return nil, err
		}
		wanted := len(args) == 0
		for _, arg := range args {
			if names(arg, &ep) {
				wanted, found[arg] = true, true
			}
		}
		if !wanted {
			continue
		}
		r, err := endpointPolicy(state, rules, &ep)
		if err != nil {
			return nil, err
		}
		reports = append(reports, r)
	}
	for _, arg := range args {
		if !found[arg] {
			return nil, fmt.Errorf("no endpoint of %q on this node; \"podgate status\" lists them", arg)
		}
	}
	slices.SortFunc(reports, func(a, b policyReport) int { return cmp.Compare(a.Endpoint, b.Endpoint) })
	return reports, nil
}

// pinnedRules are all rules in force, by policy and direction.
func pinnedRules(state *pinning.State) (map[ruleOwner][]pinning.Rule, error) {
	out := make(map[ruleOwner][]pinning.Rule)
	for rule, err := range state.Rules() {
		if err != nil {
			return nil, err
		}
		owner := ruleOwner{rule.Policy.ID, rule.Direction}
		out[owner] = append(out[owner], rule)
	}
	for _, rules := range out {
		slices.SortFunc(rules, func(a, b pinning.Rule) int { return cmp.Compare(a.Index, b.Index) })
	}
	return out, nil
}

// ruleOwner is a policy in one direction.
type ruleOwner struct {
	policy    policy.Digest
	direction policy.Direction
}

func endpointPolicy(state *pinning.State, rules map[ruleOwner][]pinning.Rule, ep *pinning.Endpoint) (policyReport, error) {
	enforced, err := state.Enforcement(*ep)
	if err != nil {
		return policyReport{}, err
	}
	r := policyReport{Endpoint: endpointName(ep), Attachment: ep.Key}
	if r.Audit, err = state.Audited(*ep); err != nil {
		return policyReport{}, err
	}
	if r.Ingress, err = directionPolicy(state, rules, enforced.Ingress); err != nil {
		return policyReport{}, err
	}
	r.Egress, err = directionPolicy(state, rules, enforced.Egress)
	return r, err
}

func directionPolicy(state *pinning.State, rules map[ruleOwner][]pinning.Rule, id uint32) (directionReport, error) {
	r := directionReport{Ruleset: id}
	switch id {
	case pinning.RulesetClosed:
		r.State, r.Default = "closed", policy.Deny.String()
		return r, nil
	case pinning.RulesetOpen:
		r.State, r.Default = "open", policy.Allow.String()
		return r, nil
	}
	ruleset, err := state.Ruleset(id)
	if err != nil {
		return r, err
	}
	r.State, r.Default = "enforcing", ruleset.Default.String()
	for _, p := range ruleset.Policies {
		m := memberReport{Policy: p.String(), Rules: []ruleReport{}}
		for _, rule := range rules[ruleOwner{p.ID, ruleset.Direction}] {
			if rule.Index < 0 {
				counter := rule.Counter
				m.Isolation = &counter
				continue
			}
			m.Rules = append(m.Rules, ruleReport{rule.Index, rule.Action.String(), rule.Text, rule.Counter})
		}
		r.Policies = append(r.Policies, m)
	}
	return r, nil
}

func (a *app) writePolicy(w *bytes.Buffer, reports []policyReport) {
	if len(reports) == 0 {
		fmt.Fprintln(w, "no endpoints")
	}
	for i, r := range reports {
		if i > 0 {
			fmt.Fprintln(w)
		}
		audit := ""
		if r.Audit {
			audit = a.paint(yellow, " (audit: nothing is denied)")
		}
		fmt.Fprintf(w, "%s%s\n", a.paint(bold, r.Endpoint), audit)
		a.writeDirection(w, "ingress", r.Ingress)
		a.writeDirection(w, "egress", r.Egress)
	}
}

func (a *app) writeDirection(w *bytes.Buffer, direction string, r directionReport) {
	switch r.State {
	case "closed":
		fmt.Fprintf(w, "  %s: %s, its policy is not known yet\n", direction, a.paint(yellow, "closed"))
		return
	case "open":
		fmt.Fprintf(w, "  %s: %s, no policy applies\n", direction, a.paint(green, "open"))
		return
	}
	fmt.Fprintf(w, "  %s: %s, otherwise %s\n", direction, a.paint(green, "enforcing"), r.Default)
	for _, p := range r.Policies {
		fmt.Fprintf(w, "    %s\n", p.Policy)
		rows := [][]cell{}
		for _, rule := range p.Rules {
			rows = append(rows, row(fmt.Sprintf("      %d", rule.Index), rule.Action, rule.Text,
				plural(int(rule.Packets), "packet", "packets"), size(rule.Bytes)))
		}
		if p.Isolation != nil {
			rows = append(rows, row("      -", "deny", "whatever no rule matches",
				plural(int(p.Isolation.Packets), "packet", "packets"), size(p.Isolation.Bytes)))
		}
		a.columns(w, rows)
	}
}
