// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package hubble

import (
	"context"
	"crypto/rand"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"time"

	flowpb "github.com/cilium/cilium/api/v1/flow"
	observerpb "github.com/cilium/cilium/api/v1/observer"
	peerpb "github.com/cilium/cilium/api/v1/peer"
	relaypb "github.com/cilium/cilium/api/v1/relay"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/podgate/podgate/observe/history"
	"github.com/podgate/podgate/observe/naming"
)

// Options of a [Server].
type Options struct {
	// Node is this node's name, Cluster that of its cluster.
	Node, Cluster string
	// Version of podgate.
	Version string
	// Address at which other nodes reach this server, if they do, and TLS
	// whether they have to speak that.
	Address netip.AddrPort
	TLS     bool
}

// Server answers from a history. It reads that in the caller's goroutine and in
// those of gRPC; a client that is slow keeps no other waiting.
type Server struct {
	observerpb.UnimplementedObserverServer
	peerpb.UnimplementedPeerServer

	opts     Options
	ring     *history.Ring
	names    *naming.Table
	started  time.Time
	instance [8]byte

	mu         sync.Mutex
	seen       uint64
	namespaces map[string]time.Time
}

// NewServer is a server of what is in a ring.
func NewServer(ring *history.Ring, names *naming.Table, opts Options) *Server {
	s := &Server{opts: opts, ring: ring, names: names, started: time.Now(), namespaces: make(map[string]time.Time)}
	_, _ = rand.Read(s.instance[:]) // it does not fail
	return s
}

// healthName is what Hubble's command line and relay ask the health of, which is
// not in the API: Cilium's pkg/hubble/api/v1.
const healthName = "hubble.server.Observer"

// Register registers the services: flows, peers, and the health of both.
func (s *Server) Register(g grpc.ServiceRegistrar) {
	observerpb.RegisterObserverServer(g, s)
	peerpb.RegisterPeerServer(g, s)
	h := health.NewServer()
	for _, name := range []string{healthName, observerpb.Observer_ServiceDesc.ServiceName, peerpb.Peer_ServiceDesc.ServiceName} {
		h.SetServingStatus(name, healthpb.HealthCheckResponse_SERVING)
	}
	healthpb.RegisterHealthServer(g, h)
}

// forgetNamespace is how long after its last flow a namespace is listed.
const forgetNamespace = time.Hour

// Saw tells the server of records that have been added to the ring.
func (s *Server) Saw(records []history.Record) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range records {
		r := &records[i]
		if r.Lost > 0 {
			continue
		}
		s.seen++
		for _, p := range []*naming.Party{r.Local, r.Peer} {
			if p.Namespace != "" {
				s.namespaces[p.Namespace] = r.Event.Time
			}
		}
	}
}

// Seen is how many flows the server has been told of.
func (s *Server) Seen() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.seen
}

// nodeName is this node's as flows have it.
func (s *Server) nodeName() string { return s.opts.Cluster + "/" + s.opts.Node }

// ServerStatus implements Hubble's API.
func (s *Server) ServerStatus(context.Context, *observerpb.ServerStatusRequest) (*observerpb.ServerStatusResponse, error) {
	oldest, next, _ := s.ring.Bounds()
	return &observerpb.ServerStatusResponse{
		Version: s.version(), MaxFlows: uint64(s.ring.Size()), NumFlows: next - oldest, SeenFlows: s.Seen(),
		UptimeNs: uint64(time.Since(s.started)), FlowsRate: s.rate(time.Now()),
	}, nil
}

func (s *Server) version() string { return "podgate " + s.opts.Version }

// rate is how many flows a second there were in the last minute, as far as the
// ring goes back.
func (s *Server) rate(now time.Time) float64 {
	const window = time.Minute
	oldest, next, _ := s.ring.Bounds()
	since, count := now.Add(-window), 0
	var record [1]history.Record
	for i := next; i > oldest; i-- {
		if n, missed := s.ring.Read(i-1, record[:]); n == 0 || missed > 0 {
			break
		}
		if record[0].Event.Time.Before(since) {
			return float64(count) / window.Seconds()
		}
		count++
	}
	if count == 0 {
		return 0
	}
	if covered := now.Sub(record[0].Event.Time); oldest > 0 && covered > 0 {
		return float64(count) / covered.Seconds()
	}
	return float64(count) / window.Seconds()
}

// GetNodes implements Hubble's API: this node alone. Its relay knows the others.
func (s *Server) GetNodes(context.Context, *observerpb.GetNodesRequest) (*observerpb.GetNodesResponse, error) {
	oldest, next, _ := s.ring.Bounds()
	node := &observerpb.Node{
		Name: s.nodeName(), Version: s.version(), State: relaypb.NodeState_NODE_CONNECTED,
		UptimeNs: uint64(time.Since(s.started)), NumFlows: next - oldest, MaxFlows: uint64(s.ring.Size()), SeenFlows: s.Seen(),
	}
	if s.opts.Address.IsValid() {
		node.Address = s.opts.Address.String()
		if s.opts.TLS {
			node.Tls = &observerpb.TLS{Enabled: true, ServerName: s.serverName(s.opts.Node)}
		}
	}
	return &observerpb.GetNodesResponse{Nodes: []*observerpb.Node{node}}, nil
}

// GetNamespaces implements Hubble's API.
func (s *Server) GetNamespaces(context.Context, *observerpb.GetNamespacesRequest) (*observerpb.GetNamespacesResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := &observerpb.GetNamespacesResponse{}
	for name, last := range s.namespaces {
		if time.Since(last) > forgetNamespace {
			delete(s.namespaces, name)
		}
	}
	for _, name := range sortedKeys(s.namespaces) {
		out.Namespaces = append(out.Namespaces, &observerpb.Namespace{Cluster: s.opts.Cluster, Namespace: name})
	}
	return out, nil
}

// Notify implements the peer service of Hubble's API: all nodes there are, and
// then each change.
func (s *Server) Notify(_ *peerpb.NotifyRequest, stream grpc.ServerStreamingServer[peerpb.ChangeNotification]) error {
	known := make(map[string]*peerpb.ChangeNotification)
	for {
		nodes, changed := s.names.Nodes()
		now := make(map[string]*peerpb.ChangeNotification)
		for _, n := range nodes {
			c := s.peer(n)
			now[c.Name] = c
		}
		if self := s.peer(naming.Node{Name: s.opts.Node}); now[self.Name] == nil {
			if s.opts.Address.IsValid() {
				self.Address = s.opts.Address.String()
			}
			now[self.Name] = self
		}
		for _, name := range sortedKeys(known) {
			if now[name] == nil {
				gone := known[name]
				gone.Type = peerpb.ChangeNotificationType_PEER_DELETED
				if err := stream.Send(gone); err != nil {
					return err
				}
			}
		}
		for _, name := range sortedKeys(now) {
			c, had := now[name], known[name]
			if had != nil && had.Address == c.Address {
				continue
			}
			if had != nil {
				c.Type = peerpb.ChangeNotificationType_PEER_UPDATED
			}
			if err := stream.Send(c); err != nil {
				return err
			}
		}
		known = now
		select {
		case <-stream.Context().Done():
			return nil
		case <-changed:
		}
	}
}

// peer tells of a node. All of them serve at the same port.
func (s *Server) peer(n naming.Node) *peerpb.ChangeNotification {
	c := &peerpb.ChangeNotification{Name: n.Name, Type: peerpb.ChangeNotificationType_PEER_ADDED}
	if s.opts.Cluster != defaultCluster {
		c.Name = s.opts.Cluster + "/" + n.Name
	}
	if len(n.Addresses) > 0 {
		c.Address = n.Addresses[0].String()
		if port := s.opts.Address.Port(); port != 0 {
			c.Address = net.JoinHostPort(c.Address, strconv.Itoa(int(port)))
		}
	}
	if s.opts.TLS {
		c.Tls = &peerpb.TLS{ServerName: s.serverName(n.Name)}
	}
	return c
}

// defaultCluster is the name of a cluster that has not been given one; Hubble
// leaves it out of the names of peers.
const defaultCluster = "default"

// serverName is what a node's certificate has to be for: Hubble's relay asks for
// one under this name of every node.
func (s *Server) serverName(node string) string {
	dashes := func(name string) string { return strings.ReplaceAll(name, ".", "-") }
	return dashes(node) + "." + dashes(s.opts.Cluster) + ".hubble-grpc.cilium.io"
}

var _ interface {
	observerpb.ObserverServer
	peerpb.PeerServer
} = (*Server)(nil)

// lostEvent tells a client of events it will not get.
func (s *Server) lostEvent(source flowpb.LostEventSource, count uint64, first, last time.Time) *observerpb.GetFlowsResponse {
	return &observerpb.GetFlowsResponse{
		Time: stamp(last), NodeName: s.nodeName(),
		ResponseTypes: &observerpb.GetFlowsResponse_LostEvents{LostEvents: &flowpb.LostEvent{
			Source: source, NumEventsLost: count, First: stamp(first), Last: stamp(last),
		}},
	}
}
