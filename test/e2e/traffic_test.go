// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// ports that every pod serves, TCP and UDP.
var ports = []uint16{8080, 8081}

// dialTimeout is how long an answer may take before it counts as dropped.
const dialTimeout = time.Second

// serve answers on every port with the pod's name and what it was sent.
func (p *pod) serve() error {
	return p.Do(func() error {
		for _, port := range ports {
			tcp, err := net.ListenTCP("tcp", &net.TCPAddr{Port: int(port)})
			if err != nil {
				return err
			}
			udp, err := net.ListenUDP("udp", &net.UDPAddr{Port: int(port)})
			if err != nil {
				return errors.Join(err, tcp.Close())
			}
			p.servers = append(p.servers, func() { tcp.Close(); udp.Close() })
			go echoStreams(tcp)
			go echoDatagrams(udp)
		}
		return nil
	})
}

func (p *pod) closeServers() {
	for _, stop := range p.servers {
		stop()
	}
	p.servers = nil
}

// namePort is where [pod.tellName] does.
const namePort = 9000

// tellName answers whoever asks on namePort, TCP and UDP, with the pod's name.
func (p *pod) tellName() error {
	return p.Do(func() error {
		tcp, err := net.ListenTCP("tcp", &net.TCPAddr{Port: namePort})
		if err != nil {
			return err
		}
		udp, err := net.ListenUDP("udp", &net.UDPAddr{Port: namePort})
		if err != nil {
			return errors.Join(err, tcp.Close())
		}
		p.servers = append(p.servers, func() { tcp.Close(); udp.Close() })
		go func() {
			for {
				c, err := tcp.Accept()
				if err != nil {
					return
				}
				_, _ = io.WriteString(c, p.Name) // who does not read it asks again
				c.Close()
			}
		}()
		go func() {
			for {
				_, from, err := udp.ReadFrom(make([]byte, 1))
				if err != nil {
					return
				}
				_, _ = udp.WriteTo([]byte(p.Name), from) // a lost answer is a lost packet
			}
		}()
		return nil
	})
}

// askName asks what answers with its name.
func (p *pod) askName(network string, to netip.AddrPort) (name string, got outcome, err error) {
	got, err = punctually(func() error {
		c, err := p.dial(network, to)
		if err != nil {
			return err
		}
		defer c.Close()
		if err := c.SetDeadline(time.Now().Add(dialTimeout)); err != nil {
			return err
		}
		if network == "udp" {
			if _, err := c.Write([]byte{0}); err != nil {
				return err
			}
		}
		b := make([]byte, 256)
		n, err := c.Read(b)
		name = string(b[:n])
		return err
	})
	return name, got, err
}

// lookup asks a resolver for the addresses of a name, of a family: ip4 or ip6.
func (p *pod) lookup(resolver netip.AddrPort, family, name string) ([]netip.Addr, error) {
	ctx, cancel := context.WithTimeout(context.Background(), dialTimeout)
	defer cancel()
	r := net.Resolver{PreferGo: true, Dial: func(_ context.Context, network, _ string) (net.Conn, error) {
		return p.dial(network, resolver)
	}}
	addresses, err := r.LookupNetIP(ctx, family, name+".")
	for i := range addresses {
		addresses[i] = addresses[i].Unmap()
	}
	return addresses, err
}

func echoStreams(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			_, _ = io.Copy(c, c) // ends with the client
		}()
	}
}

func echoDatagrams(c net.PacketConn) {
	buffer := make([]byte, 65536)
	for {
		n, from, err := c.ReadFrom(buffer)
		if err != nil {
			return
		}
		_, _ = c.WriteTo(buffer[:n], from) // a lost answer is a lost packet
	}
}

// outcome of an attempt to talk.
type outcome string

const (
	answered outcome = "answered"
	dropped  outcome = "dropped" // no answer of any kind
	refused  outcome = "refused" // RST or an ICMP error
)

// dial opens a connection from the pod. UDP has none: see [pod.talk].
func (p *pod) dial(network string, to netip.AddrPort) (c net.Conn, err error) {
	err = p.Do(func() error {
		c, err = (&net.Dialer{Timeout: dialTimeout}).Dial(network, to.String())
		return err
	})
	return c, err
}

// talk sends a few bytes and waits for them to come back.
func (p *pod) talk(network string, to netip.AddrPort) (outcome, error) {
	var c net.Conn
	got, err := punctually(func() (err error) {
		c, err = p.dial(network, to)
		return err
	})
	if got != answered || err != nil {
		return got, err
	}
	defer c.Close()
	return exchange(c)
}

// punctually does what takes dialTimeout at most, and tells how it ended. On a
// busy machine this process itself may have been late, so that its time-out
// says nothing of the network: then it does it again.
func punctually(do func() error) (outcome, error) {
	for {
		start := time.Now()
		err := do()
		if err == nil {
			return answered, nil
		}
		if o, err := classify(err); o != dropped || time.Since(start) < dialTimeout*5/4 {
			return o, err
		}
	}
}

// exchange sends a few bytes over c and waits for them to come back. Answers to
// earlier questions that are late are no answer to this one.
func exchange(c net.Conn) (outcome, error) {
	return punctually(func() error {
		question := fmt.Sprintf("%020d", time.Now().UnixNano())
		if err := c.SetDeadline(time.Now().Add(dialTimeout)); err != nil {
			return err
		}
		_, err := io.WriteString(c, question)
		var got strings.Builder
		buffer := make([]byte, 4096)
		for err == nil && !strings.HasSuffix(got.String(), question) {
			var n int
			n, err = c.Read(buffer)
			got.Write(buffer[:n])
		}
		return err
	})
}

// transfer sends size bytes and counts what comes back until the end.
func transfer(c net.Conn, size int64) (n int64, err error) {
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return 0, err
	}
	sent := make(chan error)
	go func() {
		_, err := io.CopyN(c, zeros{}, size)
		if err == nil {
			err = c.(*net.TCPConn).CloseWrite()
		}
		sent <- err
	}()
	n, err = io.Copy(io.Discard, c)
	return n, errors.Join(err, <-sent)
}

// zeros never ends.
type zeros struct{}

func (zeros) Read(b []byte) (int, error) {
	clear(b)
	return len(b), nil
}

// classify tells what an error of a socket means. Others are the test's own.
func classify(err error) (outcome, error) {
	var timeout interface{ Timeout() bool }
	switch {
	case errors.As(err, &timeout) && timeout.Timeout():
		return dropped, nil
	case errors.Is(err, unix.ECONNREFUSED), errors.Is(err, unix.ECONNRESET), errors.Is(err, unix.EHOSTUNREACH),
		errors.Is(err, unix.ENETUNREACH), errors.Is(err, unix.EACCES), errors.Is(err, io.EOF):
		return refused, nil
	}
	return "", err
}

// probe is one attempt and what must come of it.
type probe struct {
	from    *pod
	network string // tcp or udp
	to      netip.AddrPort
	name    string // of what is at to
	want    outcome
}

func (p probe) String() string {
	return fmt.Sprintf("%s -> %s (%s) over %s", p.from.Name, p.name, p.to, p.network)
}

// reaches are the probes from pods to a port of another pod, TCP and UDP, each
// family.
func reaches(want outcome, to *pod, port uint16, from ...*pod) []probe {
	var probes []probe
	for _, f := range from {
		for _, a := range to.Addresses {
			for _, network := range []string{"tcp", "udp"} {
				probes = append(probes, probe{f, network, netip.AddrPortFrom(a, port), to.Name, want})
			}
		}
	}
	return probes
}

// expect waits until every probe has the outcome it must have, twice in a row:
// the first time shows that the policy is in force, the second that it stays.
func (l *lab) expect(groups ...[]probe) {
	l.t.Helper()
	l.expectWithin(inForce, groups...)
}

func (l *lab) expectWithin(limit time.Duration, groups ...[]probe) {
	l.t.Helper()
	var probes []probe
	for _, g := range groups {
		probes = append(probes, g...)
	}
	err := within(l.t.Context(), limit, func(context.Context) error { return attempt(probes) })
	if err == nil {
		err = attempt(probes)
	}
	if err != nil {
		l.t.Error(err)
	}
}

// attempt makes every probe once and returns those with another outcome than
// they must have.
func attempt(probes []probe) error {
	return concurrently(len(probes), func(i int) error {
		p := probes[i]
		got, err := p.from.talk(p.network, p.to)
		if err != nil {
			return fmt.Errorf("%s: %w", p, err)
		}
		if got != p.want {
			return fmt.Errorf("%s: %s, must be %s", p, got, p.want)
		}
		return nil
	})
}

// concurrently calls do with 0 to n-1, many at a time, and returns all errors.
func concurrently(n int, do func(int) error) error {
	var (
		wg    sync.WaitGroup
		slots = make(chan struct{}, 16)
		errs  = make([]error, n)
	)
	for i := range n {
		wg.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			errs[i] = do(i)
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// stream is an open connection that a test uses again and again.
type stream struct {
	net.Conn
	t *testing.T
}

// open opens a connection that must be answered.
func (l *lab) open(from *pod, network string, to netip.AddrPort) *stream {
	l.t.Helper()
	c, err := from.dial(network, to)
	if err != nil {
		l.t.Fatalf("%s -> %s: %v", from.Name, to, err)
	}
	l.t.Cleanup(func() { c.Close() })
	s := &stream{c, l.t}
	if got := s.exchange(); got != answered {
		l.t.Fatalf("%s -> %s: %s", from.Name, to, got)
	}
	return s
}

// exchange is [exchange] over the open connection.
func (s *stream) exchange() outcome {
	s.t.Helper()
	o, err := exchange(s)
	if err != nil {
		s.t.Fatal(err)
	}
	return o
}
