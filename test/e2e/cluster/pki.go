// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package cluster

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"

	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/clientcmd/api"
)

// pki is a certificate authority whose certificates live as long as a cluster
// of a test.
type pki struct {
	dir    string
	server string // URL of the API server

	key *ecdsa.PrivateKey
	ca  *x509.Certificate
	pem []byte
}

const lifetime = 7 * 24 * time.Hour

// newPKI writes ca.crt, and sa.key, which signs service account tokens, to dir.
func newPKI(dir, server string) (*pki, error) {
	p := &pki{dir: dir, server: server}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	var err error
	if p.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		Subject:               pkix.Name{CommonName: "podgate-e2e"},
		NotBefore:             time.Now().Add(-time.Minute),
		NotAfter:              time.Now().Add(lifetime),
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &p.key.PublicKey, p.key)
	if err != nil {
		return nil, err
	}
	if p.ca, err = x509.ParseCertificate(der); err != nil {
		return nil, err
	}
	p.pem = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	if err := os.WriteFile(p.path("ca.crt"), p.pem, 0o600); err != nil {
		return nil, err
	}
	account, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	keyPEM, err := encodeKey(account)
	if err != nil {
		return nil, err
	}
	return p, os.WriteFile(p.path("sa.key"), keyPEM, 0o600)
}

func (p *pki) path(name string) string { return filepath.Join(p.dir, name) }

func encodeKey(key *ecdsa.PrivateKey) ([]byte, error) {
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}), nil
}

// issue signs a certificate for servers and clients.
func (p *pki) issue(user, group string, names []string, addresses []net.IP) (cert, key []byte, err error) {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return nil, nil, err
	}
	template := &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: user},
		NotBefore:    time.Now().Add(-time.Minute),
		NotAfter:     time.Now().Add(lifetime),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		DNSNames:     names,
		IPAddresses:  addresses,
	}
	if group != "" {
		template.Subject.Organization = []string{group} //nolint:misspell // its name
	}
	der, err := x509.CreateCertificate(rand.Reader, template, p.ca, &private.PublicKey, p.key)
	if err != nil {
		return nil, nil, err
	}
	key, err = encodeKey(private)
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), key, err
}

// certificate writes NAME.crt and NAME.key.
func (p *pki) certificate(name, user, group string, names []string, addresses []net.IP) error {
	cert, key, err := p.issue(user, group, names, addresses)
	if err != nil {
		return fmt.Errorf("certificate %s: %w", name, err)
	}
	if err := os.WriteFile(p.path(name+".crt"), cert, 0o600); err != nil {
		return err
	}
	return os.WriteFile(p.path(name+".key"), key, 0o600)
}

// kubeconfig writes a file with which user speaks to the API server. It holds
// all that is needed.
func (p *pki) kubeconfig(file, user, group string) error {
	cert, key, err := p.issue(user, group, nil, nil)
	if err != nil {
		return fmt.Errorf("kubeconfig of %s: %w", user, err)
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	return clientcmd.WriteToFile(api.Config{
		Clusters:       map[string]*api.Cluster{"e2e": {Server: p.server, CertificateAuthorityData: p.pem}},
		AuthInfos:      map[string]*api.AuthInfo{user: {ClientCertificateData: cert, ClientKeyData: key}},
		Contexts:       map[string]*api.Context{"e2e": {Cluster: "e2e", AuthInfo: user}},
		CurrentContext: "e2e",
	}, file)
}
