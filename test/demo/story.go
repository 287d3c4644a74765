// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"time"
)

// story is what the demo tells, chapter by chapter.
type story struct {
	style
	lab     *lab
	podgate *command
	number  int
	// last is what the latest comparison measured.
	last matrix
}

func (s *story) chapter(title string) {
	s.number++
	fmt.Printf("\n%s\n", s.bold(fmt.Sprintf("── %d. %s ", s.number, title)+
		strings.Repeat("─", max(0, 88-len(title)))))
}

func (s *story) say(format string, args ...any) {
	fmt.Printf("  "+format+"\n", args...)
}

// quote prints text of others, indented.
func (s *story) quote(text string) {
	for line := range strings.Lines(text) {
		fmt.Printf("    %s\n", s.dim(strings.TrimRight(line, "\n")))
	}
}

// expect says what happened, and fails when it is not what should have.
func (s *story) expect(what string, reached, want bool) error {
	word := s.red("blocked")
	if reached {
		word = s.green("reached")
	}
	s.say("%-52s %s", what, word)
	if reached != want {
		return fmt.Errorf("%s: reached is %t, want %t", what, reached, want)
	}
	return nil
}

func (s *story) tell(ctx context.Context) error {
	for _, chapter := range []func(context.Context) error{s.pods, s.before, s.policy, s.why, s.alone} {
		if err := errors.Join(ctx.Err(), chapter(ctx)); err != nil {
			return err
		}
	}
	return nil
}

// pods makes the node and the first pods.
func (s *story) pods(ctx context.Context) error {
	s.chapter("A node, five pods")
	since := time.Now()
	if err := s.podgate.start(); err != nil {
		return err
	}
	if _, err := s.podgate.publish("pods.yaml"); err != nil {
		return err
	}
	if err := s.podgate.synced(ctx, since, 0); err != nil {
		return err
	}
	s.say("The node is a network namespace. podgate sync reads a policy directory, without any policy yet.")
	s.say("The pods come through libcni: bridge and host-local, then podgate-cni.")
	fmt.Println()
	for _, p := range [][2]string{{"shop", "web"}, {"shop", "api"}, {"shop", "db"}, {"ops", "probe"}, {"guest", "visitor"}} {
		began := time.Now()
		pod, err := s.lab.add(ctx, p[0], p[1])
		if err != nil {
			return err
		}
		s.say("%-14s %-12s %-10s %s", pod.fullName(), pod.addresses[0], pod.addresses[1],
			s.dim(fmt.Sprintf("ADD of the chain took %d ms", time.Since(began).Milliseconds())))
	}
	return nil
}

// before shows that everybody reaches everybody.
func (s *story) before(ctx context.Context) error {
	s.chapter("Before any policy: who reaches whom")
	if err := s.compare(ctx); err != nil {
		return err
	}
	for pair, f := range s.last {
		if !f.v4 || !f.v6 {
			return fmt.Errorf("%s to %s on %s: %s, without any policy", pair.from, pair.to, pair.port, f)
		}
	}
	return nil
}

// compare prints what connections show beside what podgate says, and fails
// when the two differ.
func (s *story) compare(ctx context.Context) error {
	s.last = s.lab.measure()
	said, err := s.podgate.matrix(ctx)
	if err != nil {
		return err
	}
	var names []string
	for _, p := range s.lab.pods {
		names = append(names, p.Name)
	}
	s.print(names, "tried with real connections", "as podgate matrix says", s.last, said)
	if d := s.last.differences(said); len(d) > 0 {
		return fmt.Errorf("connections and podgate matrix differ:\n%s", strings.Join(d, "\n"))
	}
	s.say("%s", s.dim("Each cell: IPv4 and IPv6, a handshake or a datagram, and an echo. Both sides agree."))
	return nil
}

// policy puts NetworkPolicies into force under open connections.
func (s *story) policy(ctx context.Context) error {
	s.chapter("NetworkPolicies come, under open connections")
	fromAPI, err := s.open("api", "db")
	if err != nil {
		return err
	}
	defer fromAPI.Close()
	fromVisitor, err := s.open("visitor", "db")
	if err != nil {
		return err
	}
	defer fromVisitor.Close()

	since := time.Now()
	text, err := s.podgate.publish("policy.yaml")
	if err != nil {
		return err
	}
	if err := s.podgate.synced(ctx, since, strings.Count(text, "kind: NetworkPolicy")); err != nil {
		return err
	}
	s.quote(text)
	fmt.Println()
	s.say("In force %d ms after the file was written.", time.Since(since).Milliseconds())
	err = errors.Join(
		s.expect("open connection of api to db:", echo(fromAPI) == nil, true),
		s.expect("open connection of visitor to db:", echo(fromVisitor) == nil, false))
	if err != nil {
		return err
	}
	fmt.Println()
	return s.compare(ctx)
}

// open opens a connection between two pods and uses it.
func (s *story) open(from, to string) (net.Conn, error) {
	c, err := s.lab.pod(from).dial(s.lab.pod(to).addresses[0], ports[0])
	if err != nil {
		return nil, err
	}
	return c, echo(c)
}

// why shows drops and where they come from.
func (s *story) why(ctx context.Context) error {
	s.chapter("Why was it blocked?")
	if _, err := s.podgate.output(ctx, "flows"); err != nil { // takes what happened so far
		return err
	}
	visitor, web, db := s.lab.pod("visitor"), s.lab.pod("web"), s.lab.pod("db")
	visitor.reaches(db.addresses[1], ports[0])
	if err := s.ask(ctx, "flows", "--verdict", "denied", "--pod", db.fullName()); err != nil {
		return err
	}
	visitor.reaches(web.addresses[0], ports[1])
	if err := s.ask(ctx, "flows", "--verdict", "denied", "--pod", visitor.fullName()); err != nil {
		return err
	}
	return s.ask(ctx, "explain", "--from", visitor.fullName(), "--to", db.fullName(), "--port", "8080/TCP")
}

// ask runs podgate and prints question and answer.
func (s *story) ask(ctx context.Context, question ...string) error {
	answer, err := s.podgate.output(ctx, question...)
	if err != nil {
		return err
	}
	if answer == "" {
		return fmt.Errorf("podgate %s: no answer", strings.Join(question, " "))
	}
	s.say("# podgate %s", strings.Join(question, " "))
	s.quote(answer)
	fmt.Println()
	return nil
}

// alone shows what happens without the daemon.
func (s *story) alone(ctx context.Context) error {
	s.chapter("The daemon dies")
	pid, err := s.podgate.kill()
	if err != nil {
		return err
	}
	s.say("# kill -9 %d", pid)
	if d := s.last.differences(s.lab.measure()); len(d) > 0 {
		return fmt.Errorf("enforcement changed with the daemon's death:\n%s", strings.Join(d, "\n"))
	}
	s.say("All %d cells are what they were.", len(s.last))
	fmt.Println()

	s.say("A pod that the daemon had heard of starts now. ADD finds its policy in the kernel:")
	if _, err := s.lab.add(ctx, "shop", "api-2"); err != nil {
		return err
	}
	s.say("A pod that nobody has heard of starts, too. Its gate stays closed:")
	if _, err := s.lab.add(ctx, "guest", "unheard-of"); err != nil {
		return err
	}
	reaches := func(from, to string) bool {
		return s.lab.pod(from).reaches(s.lab.pod(to).addresses[1], ports[0])
	}
	return errors.Join(
		s.expect("shop/web to shop/api-2, allowed by api-serves-web", reaches("web", "api-2"), true),
		s.expect("shop/api-2 to shop/db, allowed by db-serves-api", reaches("api-2", "db"), true),
		s.expect("guest/visitor to shop/api-2", reaches("visitor", "api-2"), false),
		s.expect("guest/unheard-of to shop/web", reaches("unheard-of", "web"), false),
		s.expect("ops/probe to guest/unheard-of", reaches("probe", "unheard-of"), false))
}

// end removes everything and proves it.
func (s *story) end() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	left, err := record(s.lab)
	_, killed := s.podgate.kill()
	err = errors.Join(err, killed, s.lab.Close(ctx))
	if err != nil {
		return err
	}
	if err := left.check(); err != nil {
		return err
	}
	s.chapter("Nothing is left")
	s.say("DEL for each pod, then the node's namespaces and its bpffs: %d maps, %d programs, %d paths are gone.",
		len(left.maps), len(left.programs), len(left.paths))
	return nil
}
