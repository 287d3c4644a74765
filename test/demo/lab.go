// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"time"

	"github.com/podgate/podgate/test/netlab"
)

// port is what every pod serves.
type port struct {
	protocol string // "tcp" or "udp"
	number   uint16
}

var ports = []port{{"tcp", 8080}, {"udp", 5353}}

// patience is how long a connection may take before it counts as blocked.
// Blocked packets are dropped, so there is nothing else to wait for.
const patience = 1500 * time.Millisecond

// pod is a pod that runs.
type pod struct {
	*netlab.Pod
	addresses []netip.Addr // one IPv4, one IPv6
	servers   []io.Closer
}

// lab is a node and the pods on it.
type lab struct {
	node *netlab.Node
	list netlab.Conflist
	pods []*pod
}

func newLab(plugins string) (*lab, error) {
	node, err := netlab.New(netlab.Options{Plugins: plugins})
	if err != nil {
		return nil, err
	}
	return &lab{node: node, list: netlab.Conflist{
		CNIVersion: "1.0.0",
		Name:       "demo",
		Plugins: []netlab.Plugin{
			node.Bridge("cni0", "10.88.0.0/24", "fd88::/64"),
			node.Podgate(),
		},
	}}, nil
}

// add starts a pod and its servers.
func (l *lab) add(ctx context.Context, namespace, name string) (*pod, error) {
	spec := netlab.PodSpec{Namespace: namespace, Name: name, UID: "uid-" + name}
	p, result, err := l.node.AddPod(ctx, l.list, spec)
	if err != nil {
		return nil, err
	}
	started := &pod{Pod: p}
	l.pods = append(l.pods, started)
	for _, ip := range result.IPs {
		a, _ := netip.AddrFromSlice(ip.Address.IP)
		started.addresses = append(started.addresses, a.Unmap())
	}
	return started, started.serve()
}

// pod finds one by its name.
func (l *lab) pod(name string) *pod {
	for _, p := range l.pods {
		if p.Name == name {
			return p
		}
	}
	return nil
}

// Close deletes the pods and the node.
func (l *lab) Close(ctx context.Context) error {
	var errs []error
	for _, p := range l.pods {
		for _, s := range p.servers {
			errs = append(errs, s.Close())
		}
		errs = append(errs, l.node.DelPod(ctx, p.Pod))
	}
	return errors.Join(append(errs, l.node.Close())...)
}

// serve echoes on every port until the servers are closed.
func (p *pod) serve() error {
	return p.Do(func() error {
		for _, port := range ports {
			address := net.JoinHostPort("", strconv.Itoa(int(port.number)))
			switch port.protocol {
			case "tcp":
				l, err := net.Listen("tcp", address)
				if err != nil {
					return err
				}
				p.servers = append(p.servers, l)
				go echoStreams(l)
			case "udp":
				c, err := net.ListenPacket("udp", address)
				if err != nil {
					return err
				}
				p.servers = append(p.servers, c)
				go echoDatagrams(c)
			}
		}
		return nil
	})
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
	buffer := make([]byte, 64)
	for {
		n, from, err := c.ReadFrom(buffer)
		if err != nil {
			return
		}
		_, _ = c.WriteTo(buffer[:n], from) // a lost answer is a lost packet
	}
}

// dial opens a connection of p to another pod's address.
func (p *pod) dial(to netip.Addr, port port) (c net.Conn, err error) {
	err = p.Do(func() error {
		c, err = net.DialTimeout(port.protocol, netip.AddrPortFrom(to, port.number).String(), patience)
		return err
	})
	return c, err
}

// echo sends a byte and waits for it to come back.
func echo(c net.Conn) error {
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	if _, err := c.Write([]byte{1}); err != nil {
		return err
	}
	_, err := io.ReadFull(c, make([]byte, 1))
	return err
}

// measure tries every pair of pods on every port over both families, all at
// once.
func (l *lab) measure() matrix {
	m := matrix{}
	var (
		lock sync.Mutex
		wait sync.WaitGroup
	)
	for _, from := range l.pods {
		for _, to := range l.pods {
			if from == to {
				continue
			}
			for _, port := range ports {
				for _, a := range to.addresses {
					wait.Go(func() {
						reached := from.reaches(a, port)
						lock.Lock()
						defer lock.Unlock()
						m.add(from.Name, to.Name, port, a, reached)
					})
				}
			}
		}
	}
	wait.Wait()
	return m
}

func (p *pod) reaches(to netip.Addr, port port) bool {
	c, err := p.dial(to, port)
	if err != nil {
		return false
	}
	defer c.Close()
	return echo(c) == nil
}

func (p port) String() string { return fmt.Sprintf("%s/%d", p.protocol, p.number) }
