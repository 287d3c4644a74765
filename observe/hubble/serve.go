// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package hubble

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
)

// TLSFiles are what a server proves itself with and knows clients by, in PEM.
// They are read again for each connection, so that they can be renewed.
type TLSFiles struct{ Certificate, Key, ClientCA string }

// Check reads the files.
func (f TLSFiles) Check() error {
	_, err := f.config()
	return err
}

func (f TLSFiles) config() (*tls.Config, error) {
	certificate, err := tls.LoadX509KeyPair(f.Certificate, f.Key)
	if err != nil {
		return nil, fmt.Errorf("certificate: %w", err)
	}
	text, err := os.ReadFile(f.ClientCA)
	if err != nil {
		return nil, fmt.Errorf("CA of clients: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(text) {
		return nil, fmt.Errorf("CA of clients: %s has no certificate", f.ClientCA)
	}
	return &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{certificate},
		ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool, NextProtos: []string{"h2"},
	}, nil
}

func (f TLSFiles) credentials() credentials.TransportCredentials {
	return credentials.NewTLS(&tls.Config{
		MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"},
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return f.config() },
	})
}

// Listen opens a unix socket that only root may use. What a former process left
// there is removed; one that is served is an error.
func Listen(ctx context.Context, path string) (net.Listener, error) {
	if c, err := (&net.Dialer{Timeout: time.Second}).DialContext(ctx, "unix", path); err == nil {
		c.Close()
		return nil, fmt.Errorf("listen on %s: another process serves it", path)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	l, err := (&net.ListenConfig{}).Listen(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// Serve serves local, and remote unless it is nil, until ctx is done. Clients of
// remote need a certificate; without files anybody may read there.
func (s *Server) Serve(ctx context.Context, local, remote net.Listener, files *TLSFiles) error {
	g, ctx := errgroup.WithContext(ctx)
	serve := func(l net.Listener, options ...grpc.ServerOption) {
		server := grpc.NewServer(append(options, grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{
			MinTime: 5 * time.Second, PermitWithoutStream: true, // what Hubble's relay does
		}))...)
		s.Register(server)
		g.Go(func() error {
			stop := context.AfterFunc(ctx, server.Stop)
			defer stop()
			if err := server.Serve(l); err != nil {
				return fmt.Errorf("serve %s: %w", l.Addr(), err)
			}
			return nil
		})
	}
	serve(local)
	if remote != nil {
		var options []grpc.ServerOption
		if files != nil {
			options = append(options, grpc.Creds(files.credentials()))
		}
		serve(remote, options...)
	}
	return g.Wait()
}
