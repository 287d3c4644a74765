// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package hubble_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io"
	"math/big"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	flowpb "github.com/cilium/cilium/api/v1/flow"
	observerpb "github.com/cilium/cilium/api/v1/observer"
	peerpb "github.com/cilium/cilium/api/v1/peer"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/fieldmaskpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/podgate/podgate/bpf/flow"
	"github.com/podgate/podgate/bpf/policy"
	"github.com/podgate/podgate/observe/history"
	"github.com/podgate/podgate/observe/hubble"
	"github.com/podgate/podgate/observe/naming"
	"github.com/podgate/podgate/syncd/manifest"
	"github.com/podgate/podgate/syncd/source"
)

// lab is a server with its ring.
type lab struct {
	t      *testing.T
	ring   *history.Ring
	names  *naming.Table
	server *hubble.Server
	socket string
	remote string
}

var epoch = time.Date(2026, 11, 24, 0, 0, 0, 0, time.UTC)

func newLab(t *testing.T, size int, files *hubble.TLSFiles) *lab {
	t.Helper()
	l := &lab{t: t, ring: history.New(size), socket: filepath.Join(t.TempDir(), "hubble.sock")}
	l.names = naming.NewTable(naming.Options{Node: "n1", Cluster: "default"})
	local, err := hubble.Listen(t.Context(), l.socket)
	if err != nil {
		t.Fatal(err)
	}
	remote, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.remote = remote.Addr().String()
	l.server = hubble.NewServer(l.ring, l.names, hubble.Options{
		Node: "n1", Cluster: "default", Version: "v1", Address: netip.MustParseAddrPort(l.remote), TLS: files != nil,
	})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- l.server.Serve(ctx, local, remote, files) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return l
}

// add adds events of lengths from up to to, a second apart.
func (l *lab) add(from, to int) {
	var records []history.Record
	for i := from; i < to; i++ {
		records = append(records, history.Record{
			Event: flow.Flow{
				Time: epoch.Add(time.Duration(i) * time.Second), Verdict: flow.Allowed, EtherType: 0x0800, Protocol: policy.UDP,
				Local: netip.MustParseAddrPort("10.0.0.1:53"), Peer: netip.AddrPortFrom(netip.MustParseAddr("10.0.0.2"), uint16(i)),
			},
			Names: naming.Names{Local: naming.World(), Peer: naming.World()},
		})
	}
	l.ring.Append(records...)
	l.server.Saw(records)
}

func (l *lab) dial(target string, c credentials.TransportCredentials) *grpc.ClientConn {
	l.t.Helper()
	conn, err := grpc.NewClient(target, grpc.WithTransportCredentials(c))
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { conn.Close() })
	return conn
}

func (l *lab) client() observerpb.ObserverClient {
	return observerpb.NewObserverClient(l.dial("unix://"+l.socket, insecure.NewCredentials()))
}

// ports reads a stream to its end: those that tell the flows apart.
func ports(t *testing.T, stream grpc.ServerStreamingClient[observerpb.GetFlowsResponse]) (out []uint32) {
	t.Helper()
	for {
		answer, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, answer.GetFlow().GetL4().GetUDP().GetSourcePort())
	}
}

func at(i int) *timestamppb.Timestamp {
	return timestamppb.New(epoch.Add(time.Duration(i) * time.Second))
}

func TestGetFlows(t *testing.T) {
	t.Parallel()
	l := newLab(t, 8, nil)
	l.add(0, 12) // 4 to 11 are left
	odd := []*flowpb.FlowFilter{{SourcePort: []string{"5", "7", "9", "11"}}}
	for name, test := range map[string]struct {
		request *observerpb.GetFlowsRequest
		want    []uint32
	}{
		"all":            {&observerpb.GetFlowsRequest{}, []uint32{4, 5, 6, 7, 8, 9, 10, 11}},
		"last":           {&observerpb.GetFlowsRequest{Number: 3}, []uint32{9, 10, 11}},
		"more than all":  {&observerpb.GetFlowsRequest{Number: 100}, []uint32{4, 5, 6, 7, 8, 9, 10, 11}},
		"first":          {&observerpb.GetFlowsRequest{Number: 3, First: true}, []uint32{4, 5, 6}},
		"last of some":   {&observerpb.GetFlowsRequest{Number: 2, Whitelist: odd}, []uint32{9, 11}},
		"first of some":  {&observerpb.GetFlowsRequest{Number: 2, First: true, Whitelist: odd}, []uint32{5, 7}},
		"all but some":   {&observerpb.GetFlowsRequest{Blacklist: odd}, []uint32{4, 6, 8, 10}},
		"since":          {&observerpb.GetFlowsRequest{Since: at(9)}, []uint32{9, 10, 11}},
		"until":          {&observerpb.GetFlowsRequest{Until: at(6)}, []uint32{4, 5, 6}},
		"last until":     {&observerpb.GetFlowsRequest{Number: 2, Until: at(8)}, []uint32{7, 8}},
		"since, until":   {&observerpb.GetFlowsRequest{Since: at(6), Until: at(7)}, []uint32{6, 7}},
		"some since":     {&observerpb.GetFlowsRequest{Since: at(8), Whitelist: odd}, []uint32{9, 11}},
		"first since":    {&observerpb.GetFlowsRequest{Since: at(8), Number: 2, First: true}, []uint32{8, 9}},
		"since all this": {&observerpb.GetFlowsRequest{Since: at(12)}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			stream, err := l.client().GetFlows(t.Context(), test.request)
			if err != nil {
				t.Fatal(err)
			}
			if got := ports(t, stream); !slices.Equal(got, test.want) {
				t.Errorf("got %v, not %v", got, test.want)
			}
		})
	}
	for name, test := range map[string]struct {
		request *observerpb.GetFlowsRequest
		want    codes.Code
	}{
		"first and follow": {&observerpb.GetFlowsRequest{First: true, Follow: true}, codes.InvalidArgument},
		"a port":           {&observerpb.GetFlowsRequest{Whitelist: []*flowpb.FlowFilter{{SourcePort: []string{"http"}}}}, codes.InvalidArgument},
		"a time":           {&observerpb.GetFlowsRequest{Since: &timestamppb.Timestamp{Nanos: -1}}, codes.InvalidArgument},
		"a field mask":     {&observerpb.GetFlowsRequest{FieldMask: &fieldmaskpb.FieldMask{Paths: []string{"colour"}}}, codes.InvalidArgument},
		"CEL": {&observerpb.GetFlowsRequest{Blacklist: []*flowpb.FlowFilter{
			{Experimental: &flowpb.FlowFilter_Experimental{CelExpression: []string{"true"}}}}}, codes.Unimplemented},
	} {
		t.Run(name, func(t *testing.T) {
			stream, err := l.client().GetFlows(t.Context(), test.request)
			if err == nil {
				_, err = stream.Recv()
			}
			if status.Code(err) != test.want {
				t.Errorf("error is %v, not %v", err, test.want)
			}
		})
	}
	got, err := l.client().ServerStatus(t.Context(), &observerpb.ServerStatusRequest{})
	if err != nil || got.GetNumFlows() != 8 || got.GetMaxFlows() != 8 || got.GetSeenFlows() != 12 || got.GetVersion() != "podgate v1" {
		t.Errorf("status is %v, %v", got, err)
	}
}

// A client that does not read keeps nobody waiting: not the writer, not another
// client. It is told what it missed.
func TestSlowClient(t *testing.T) {
	t.Parallel()
	l := newLab(t, 64, nil)
	l.add(0, 1)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	follow := func() grpc.ServerStreamingClient[observerpb.GetFlowsResponse] {
		stream, err := l.client().GetFlows(ctx, &observerpb.GetFlowsRequest{Follow: true, Number: 1})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := stream.Recv(); err != nil { // it follows from here
			t.Fatal(err)
		}
		return stream
	}
	slow, quick := follow(), follow()
	const all = 20000 // far more than transport and ring hold
	go func() {
		for i := 1; i < all; i++ {
			l.add(i, i+1)
		}
	}()
	for got := uint32(0); got != all-1; {
		answer, err := quick.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if f := answer.GetFlow(); f != nil {
			got = f.GetL4().GetUDP().GetSourcePort()
		}
	}
	flows, lost := 1, uint64(0)
	for last := uint32(0); last != all-1; {
		answer, err := slow.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if e := answer.GetLostEvents(); e != nil {
			if e.GetSource() != flowpb.LostEventSource_HUBBLE_RING_BUFFER {
				t.Errorf("lost event is %v", e)
			}
			lost += e.GetNumEventsLost()
			continue
		}
		flows++
		last = answer.GetFlow().GetL4().GetUDP().GetSourcePort()
	}
	// What was missed last may be told later.
	for uint64(flows)+lost < all {
		answer, err := slow.Recv()
		if err != nil {
			t.Fatal(err)
		}
		lost += answer.GetLostEvents().GetNumEventsLost()
	}
	if uint64(flows)+lost != all || lost == 0 {
		t.Errorf("%d flows came and %d were lost, of %d", flows, lost, all)
	}
}

func TestLostInTheKernel(t *testing.T) {
	t.Parallel()
	l := newLab(t, 8, nil)
	l.ring.Append(history.Record{Event: flow.Flow{Time: epoch.Add(time.Second)}, Lost: 7, Since: epoch})
	stream, err := l.client().GetFlows(t.Context(), &observerpb.GetFlowsRequest{Whitelist: []*flowpb.FlowFilter{{SourcePort: []string{"1"}}}})
	if err != nil {
		t.Fatal(err)
	}
	answer, err := stream.Recv()
	lost := answer.GetLostEvents()
	if err != nil || lost.GetNumEventsLost() != 7 || lost.GetSource() != flowpb.LostEventSource_PERF_EVENT_RING_BUFFER || !lost.GetFirst().AsTime().Equal(epoch) {
		t.Errorf("got %v, %v", answer, err)
	}
}

func TestPeers(t *testing.T) {
	t.Parallel()
	l := newLab(t, 8, nil)
	stream, err := peerpb.NewPeerClient(l.dial("unix://"+l.socket, insecure.NewCredentials())).Notify(t.Context(), &peerpb.NotifyRequest{})
	if err != nil {
		t.Fatal(err)
	}
	_, port, _ := net.SplitHostPort(l.remote)
	want := func(kind peerpb.ChangeNotificationType, name, address string) {
		t.Helper()
		got, err := stream.Recv()
		if err != nil || got.GetType() != kind || got.GetName() != name || got.GetAddress() != address {
			t.Fatalf("got %v, %v; want %v of %s at %s", got, err, kind, name, address)
		}
	}
	node := func(name, address string) manifest.Object {
		return manifest.Object{Key: manifest.Key{Kind: manifest.KindNode, Name: name}, Addresses: []netip.Addr{netip.MustParseAddr(address)}}
	}
	want(peerpb.ChangeNotificationType_PEER_ADDED, "n1", l.remote)
	l.names.Apply(source.Batch{Set: []manifest.Object{node("n1", "10.1.0.1"), node("n2", "10.1.0.2")}})
	want(peerpb.ChangeNotificationType_PEER_UPDATED, "n1", "10.1.0.1:"+port)
	want(peerpb.ChangeNotificationType_PEER_ADDED, "n2", "10.1.0.2:"+port)
	l.names.Apply(source.Batch{Gone: []manifest.Key{{Kind: manifest.KindNode, Name: "n2"}}})
	want(peerpb.ChangeNotificationType_PEER_DELETED, "n2", "10.1.0.2:"+port)
}

// Only clients with a certificate of the right CA are served, and certificates
// may be renewed meanwhile.
func TestTLS(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	files := hubble.TLSFiles{
		Certificate: filepath.Join(dir, "tls.crt"), Key: filepath.Join(dir, "tls.key"), ClientCA: filepath.Join(dir, "ca.crt"),
	}
	if err := files.Check(); err == nil {
		t.Error("files that are not there are no error")
	}
	ca, other := newAuthority(t), newAuthority(t)
	ca.write(t, files)
	l := newLab(t, 8, &files)
	l.add(0, 1)
	ask := func(client, server *authority) error {
		config := &tls.Config{ServerName: "n1.default.hubble-grpc.cilium.io", RootCAs: server.pool(), MinVersion: tls.VersionTLS13}
		if client != nil {
			config.Certificates = []tls.Certificate{client.issue(t)}
		}
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		_, err := observerpb.NewObserverClient(l.dial(l.remote, credentials.NewTLS(config))).ServerStatus(ctx, &observerpb.ServerStatusRequest{})
		return err
	}
	if err := ask(ca, ca); err != nil {
		t.Error(err)
	}
	if err := ask(nil, ca); err == nil {
		t.Error("a client without a certificate is served")
	}
	if err := ask(other, ca); err == nil {
		t.Error("a client of another authority is served")
	}
	other.write(t, files)
	if err := ask(other, other); err != nil {
		t.Errorf("after a renewal: %v", err)
	}
	if err := ask(ca, other); err == nil {
		t.Error("a client of the former authority is served after a renewal")
	}
}

// authority signs certificates.
type authority struct {
	certificate *x509.Certificate
	key         *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) *authority {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "CA"}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	certificate, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &authority{certificate, key}
}

func (a *authority) pool() *x509.CertPool {
	p := x509.NewCertPool()
	p.AddCert(a.certificate)
	return p
}

// pair is a certificate for the server and for clients, in PEM.
func (a *authority) pair(t *testing.T) (certificate, key []byte) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(2), NotAfter: time.Now().Add(time.Hour), DNSNames: []string{"*.default.hubble-grpc.cilium.io"},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}, a.certificate, k.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: secret})
}

func (a *authority) issue(t *testing.T) tls.Certificate {
	t.Helper()
	out, err := tls.X509KeyPair(a.pair(t))
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func (a *authority) write(t *testing.T, files hubble.TLSFiles) {
	t.Helper()
	certificate, key := a.pair(t)
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.certificate.Raw})
	for path, text := range map[string][]byte{files.Certificate: certificate, files.Key: key, files.ClientCA: ca} {
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}
