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
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"github.com/podgate/podgate/syncd/reach"
	"github.com/podgate/podgate/syncd/source"
)

// questions are about this node, or about a directory of manifests alone.
type questions struct {
	*reach.Evaluator
	// subject is what they are about.
	subject string
	close   func() error
}

// manifestFlags say which manifests to ask about instead of this node.
type manifestFlags struct {
	policyDir string
	auditPods bool
}

const auditPodsUsage = "honour the annotation podgate.io/audit on Pods too, and not only on Namespaces"

func (m *manifestFlags) add(flags *pflag.FlagSet) {
	flags.StringVar(&m.policyDir, "policy-dir", "", "answer about these manifests instead of this node, as if every pod in them ran here")
	flags.BoolVar(&m.auditPods, "audit-pods", false, auditPodsUsage+`; with --policy-dir, else as "podgate sync" does`)
}

// questions opens what explain and matrix ask.
func (a *app) questions(ctx context.Context, m manifestFlags) (*questions, error) {
	if m.policyDir != "" {
		e, err := reach.FromDirectory(ctx, m.policyDir, m.auditPods, slog.New(slog.DiscardHandler))
		if err != nil {
			return nil, err
		}
		return &questions{e, "the manifests in " + m.policyDir, e.Close}, nil
	}
	if m.auditPods {
		return nil, errors.New("--audit-pods goes with --policy-dir: on this node it is what podgate sync was told")
	}
	node := reach.Node{Sourceless: errors.New("where the manifests are is not known; name them with --policy-dir")}
	s, _, err := a.daemon()
	if err != nil {
		return nil, err
	}
	if s != nil {
		from := origin{s.Origin}
		node.Name, node.Unlisted, node.AuditPods = from.Node, from.unlisted(), from.AuditPods
		if !from.empty() {
			options := source.DirectoryOptions{Cache: cacheDirectory(a.runDirectory()), ReadOnly: true}
			if opened, err := from.open(options, slog.New(slog.DiscardHandler)); err != nil {
				node.Sourceless = err
			} else {
				node.Source = opened
			}
		}
	}
	state, err := a.open(ctx)
	if err != nil {
		return nil, err
	}
	e, err := reach.FromNode(ctx, state, node)
	if err != nil {
		return nil, errors.Join(err, state.Close())
	}
	return &questions{e, "what is enforced on this node", state.Close}, nil
}

// caveats say what the answers lack.
func (q *questions) caveats() []string {
	var out []string
	switch err := q.KernelErr; {
	case errors.Is(err, unix.EPERM):
		out = append(out, "only the compiler answered; run it as root to ask the kernel too")
	case err != nil:
		out = append(out, "only the compiler answered; the kernel could not be asked: "+err.Error())
	}
	if q.PolicyErr != nil {
		out = append(out, "only the kernel answered; the compiler could not be asked: "+q.PolicyErr.Error())
	}
	return out
}

// outcome is the error of a command that asked: problems of the manifests, or
// a kernel that judges otherwise than policy.
func (q *questions) outcome(disagree bool) error {
	if disagree || len(q.Problems) > 0 {
		return errProblem
	}
	return nil
}

func (a *app) explainCommand() *cobra.Command {
	var from, to, port string
	var manifests manifestFlags
	cmd := &cobra.Command{
		Use:   "explain --from A --to B --port 80/TCP",
		Short: "Say whether A may connect to B, and why",
		Long: `Says whether A may open a connection to B, which direction of which pod decides,
and by which rule. A and B are pods (namespace/name) or any addresses, in the
cluster or out of it; the port is like 80/TCP, 53/UDP, 5060/SCTP, or ICMP. At
an address and port of a Service each of its backends is asked about.

The question is answered twice: by the compiler from the manifests, and by the
kernel, which runs a made-up packet through the program and the tables that
judge the pod's real ones. Flows and counters stay untouched.

Exit code 2 if the two answers differ, or if manifests have problems.`,
		Example: `  podgate explain --from shop/frontend --to shop/web --port 80/TCP
  podgate explain --from 203.0.113.7 --to shop/web --port 80/TCP --policy-dir ./policies`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.explain(cmd.Context(), from, to, port, manifests)
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&from, "from", "", "who connects: a pod or an address")
	flags.StringVar(&to, "to", "", "who is connected to: a pod or an address")
	flags.StringVar(&port, "port", "", "destination port and protocol")
	manifests.add(flags)
	for _, name := range []string{"from", "to", "port"} {
		if err := cmd.MarkFlagRequired(name); err != nil {
			panic(err) // a flag that does not exist
		}
	}
	for _, name := range []string{"from", "to"} {
		if err := cmd.RegisterFlagCompletionFunc(name, a.completeEndpoints); err != nil {
			panic(err) // a flag that does not exist
		}
	}
	return cmd
}

// explanation is what podgate explain prints.
type explanation struct {
	About string `json:"about"`
	reach.Answer
	// Verdict of all paths; "mixed" if they differ.
	Verdict  string           `json:"verdict"`
	Disagree bool             `json:"disagree"`
	Caveats  []string         `json:"caveats,omitempty"`
	Problems []source.Problem `json:"problems,omitempty"`
}

func (a *app) explain(ctx context.Context, from, to, portText string, manifests manifestFlags) (err error) {
	port, err := reach.ParsePort(portText)
	if err != nil {
		return err
	}
	q, err := a.questions(ctx, manifests)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, q.close()) }()
	origin, err := q.Party(from)
	if err != nil {
		return err
	}
	destination, err := q.Party(to)
	if err != nil {
		return err
	}
	answer, err := q.Ask(ctx, origin, destination, port)
	if err != nil {
		return err
	}
	x := explanation{
		About: q.subject, Answer: answer, Verdict: verdictWord(&answer), Disagree: answer.Disagree(),
		Caveats: q.caveats(), Problems: q.Problems,
	}
	for _, p := range answer.Paths {
		if q.Assumed(p.From) {
			x.Caveats = append(x.Caveats, fmt.Sprintf("%s has no address in its manifest; %s is assumed", from, p.From))
		}
		if q.Assumed(p.To) {
			x.Caveats = append(x.Caveats, fmt.Sprintf("%s has no address in its manifest; %s is assumed", to, p.To))
		}
	}
	if err := a.print(x, func(w *bytes.Buffer) { a.writeExplanation(w, &x, port) }); err != nil {
		return err
	}
	return q.outcome(x.Disagree)
}

// mixed is the word for paths that differ.
const mixed = "mixed"

// verdictWord is [mixed] when families or backends differ.
func verdictWord(a *reach.Answer) string {
	if v := a.Verdict(); v != "" {
		return string(v)
	}
	return mixed
}

func verdictStyle(word string) style {
	switch word {
	case string(reach.Allow):
		return green
	case string(reach.Deny):
		return red
	default:
		return yellow
	}
}

func (a *app) writeExplanation(w *bytes.Buffer, x *explanation, port reach.Port) {
	fmt.Fprintf(w, "%s  %s -> %s on %s\n", a.paint(verdictStyle(x.Verdict), strings.ToUpper(x.Verdict)), x.From, x.To, port)
	for _, p := range x.Paths {
		to := p.To.String()
		if p.Service != "" {
			to = fmt.Sprintf("%s of service %s, backend %s", p.To, p.Service, p.Backend)
		}
		fmt.Fprintf(w, "\n%s -> %s  %s\n", p.From, to, a.paint(verdictStyle(string(p.Verdict)), string(p.Verdict)))
		for _, s := range p.Sides {
			a.writeSide(w, s)
		}
	}
	if len(x.Caveats) > 0 {
		fmt.Fprintln(w)
	}
	for _, c := range x.Caveats {
		fmt.Fprintf(w, "%s %s\n", a.paint(yellow, "note:"), c)
	}
	a.writeProblems(w, x.Problems)
}

func (a *app) writeSide(w *bytes.Buffer, s reach.Side) {
	fmt.Fprintf(w, "  %s of %s: %s\n", s.Direction, s.Pod, a.paint(verdictStyle(string(s.Verdict)), string(s.Verdict)))
	switch {
	case s.Disagree:
		fmt.Fprintf(w, "    %s\n", a.paint(red, "COMPILER AND KERNEL DISAGREE"))
		fmt.Fprintf(w, "    compiler: %s, %s\n", s.Compiler.Verdict, s.Compiler.Reason)
		fmt.Fprintf(w, "    kernel:   %s, %s\n", s.Kernel.Verdict, kernelReason(s.Kernel))
	case s.Compiler != nil && s.Compiler.Verdict == s.Verdict:
		fmt.Fprintf(w, "    %s\n", s.Compiler.Reason)
	case s.Kernel != nil:
		fmt.Fprintf(w, "    %s\n", kernelReason(s.Kernel))
	}
	switch {
	case s.Unasked != "":
		fmt.Fprintf(w, "    %s\n", a.paint(faint, s.Unasked))
	case !s.Disagree && s.Compiler != nil && s.Compiler.Verdict == s.Verdict:
		fmt.Fprintf(w, "    %s\n", a.paint(faint, "compiler and kernel agree"))
	}
}

func kernelReason(o *reach.Opinion) string {
	if o.Policy == "" {
		return o.Reason
	}
	if o.Rule == "" {
		return o.Reason + ", isolated by " + o.Policy
	}
	return o.Reason + ", " + o.Policy + ": " + o.Rule
}
