// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package cluster

import (
	"context"
	"net"
	"path/filepath"
	"strings"
	"time"
)

// ControlPlane is the machine that runs no pods.
type ControlPlane struct {
	*Machine
	Etcd, APIServer, Controllers, Scheduler *Process
}

func (c *Cluster) startControlPlane(ctx context.Context) error {
	var ips []net.IP
	for _, a := range append(addresses(0), "127.0.0.1", "10.96.0.1", "fd00:10:96::1") {
		ips = append(ips, net.ParseIP(a))
	}
	names := []string{
		"localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc",
		"kubernetes.default.svc.cluster.local",
	}
	for _, cert := range []struct {
		name, user, group string
		names             []string
		ips               []net.IP
	}{
		{"apiserver", "kube-apiserver", "", names, ips},
		{"kubelet-client", "kube-apiserver-kubelet-client", "system:masters", nil, nil},
	} {
		if err := c.pki.certificate(cert.name, cert.user, cert.group, cert.names, cert.ips); err != nil {
			return err
		}
	}
	if err := c.startAPIServer(); err != nil {
		return err
	}
	if err := c.connectClient(); err != nil {
		return err
	}
	if err := c.WaitAPIServer(ctx); err != nil {
		return err
	}
	return c.startControllers()
}

func (c *Cluster) startAPIServer() error {
	cp, pki := c.ControlPlane, c.pki
	var err error
	cp.Etcd, err = cp.Start("etcd", Command{Path: filepath.Join(c.Bin, "etcd"), Args: []string{
		"--data-dir", filepath.Join(cp.Dir, "etcd"),
		"--unsafe-no-fsync",
		"--listen-client-urls", "http://127.0.0.1:2379",
		"--advertise-client-urls", "http://127.0.0.1:2379",
		"--listen-peer-urls", "http://127.0.0.1:2380",
	}})
	if err != nil {
		return err
	}
	cp.APIServer, err = cp.Start("apiserver", Command{Path: filepath.Join(c.Bin, "kube-apiserver"), Args: []string{
		"--etcd-servers=http://127.0.0.1:2379",
		"--advertise-address=" + addresses(0)[0],
		"--secure-port=6443",
		"--service-cluster-ip-range=" + serviceRanges,
		"--allow-privileged=true",
		"--tls-cert-file=" + pki.path("apiserver.crt"),
		"--tls-private-key-file=" + pki.path("apiserver.key"),
		"--client-ca-file=" + pki.path("ca.crt"),
		"--kubelet-client-certificate=" + pki.path("kubelet-client.crt"),
		"--kubelet-client-key=" + pki.path("kubelet-client.key"),
		"--kubelet-preferred-address-types=InternalIP",
		"--service-account-issuer=https://kubernetes.default.svc.cluster.local",
		"--service-account-key-file=" + pki.path("sa.key"),
		"--service-account-signing-key-file=" + pki.path("sa.key"),
		"--authorization-mode=Node,RBAC",
		"--enable-admission-plugins=NodeRestriction",
		"--profiling=false",
	}})
	return err
}

func (c *Cluster) startControllers() error {
	cp := c.ControlPlane
	var configs []string
	for _, user := range []string{"system:kube-controller-manager", "system:kube-scheduler"} {
		file := c.pki.path(strings.TrimPrefix(user, "system:") + ".conf")
		if err := c.pki.kubeconfig(file, user, ""); err != nil {
			return err
		}
		configs = append(configs, file)
	}
	var err error
	cp.Controllers, err = cp.Start("controllers", Command{Path: filepath.Join(c.Bin, "kube-controller-manager"), Args: []string{
		"--kubeconfig=" + configs[0],
		"--authentication-kubeconfig=" + configs[0],
		"--authorization-kubeconfig=" + configs[0],
		"--use-service-account-credentials",
		"--leader-elect=false",
		"--service-account-private-key-file=" + c.pki.path("sa.key"),
		"--root-ca-file=" + c.pki.path("ca.crt"),
		"--cluster-cidr=" + podRanges,
		"--bind-address=127.0.0.1",
	}})
	if err != nil {
		return err
	}
	cp.Scheduler, err = cp.Start("scheduler", Command{Path: filepath.Join(c.Bin, "kube-scheduler"), Args: []string{
		"--kubeconfig=" + configs[1],
		"--authentication-kubeconfig=" + configs[1],
		"--authorization-kubeconfig=" + configs[1],
		"--leader-elect=false",
		"--bind-address=127.0.0.1",
	}})
	return err
}

// WaitAPIServer waits until the API server is ready.
func (c *Cluster) WaitAPIServer(ctx context.Context) error {
	return waitFor(ctx, 3*time.Minute, func(ctx context.Context) error {
		return c.Client.Discovery().RESTClient().Get().AbsPath("/readyz").Do(ctx).Error()
	})
}
