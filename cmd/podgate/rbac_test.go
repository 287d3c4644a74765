// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	appsv1 "k8s.io/api/apps/v1"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/yaml"
)

// account makes the service account of the manifest, with its rights, and
// returns a kubeconfig of it and what it may do.
func (c *cluster) account() (kubeconfig string, granted []string) {
	c.t.Helper()
	text, err := os.ReadFile(filepath.Join("..", "..", "install", "kubernetes", "podgate.yaml"))
	must(c.t, err)
	grant := func(rules []rbacv1.PolicyRule) {
		for _, rule := range rules {
			for _, group := range rule.APIGroups {
				for _, resource := range rule.Resources {
					for _, verb := range rule.Verbs {
						granted = append(granted, verb+" "+resource+"."+group)
					}
				}
			}
		}
	}
	ctx, create := c.t.Context(), metav1.CreateOptions{}
	documents := yaml.NewYAMLOrJSONDecoder(bytes.NewReader(text), len(text))
	for {
		var object struct {
			metav1.TypeMeta   `json:",inline"`
			metav1.ObjectMeta `json:"metadata"`
			Rules             []rbacv1.PolicyRule `json:"rules"`
			RoleRef           rbacv1.RoleRef      `json:"roleRef"`
			Subjects          []rbacv1.Subject    `json:"subjects"`
		}
		if err := documents.Decode(&object); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			c.t.Fatal(err)
		}
		m, rbac := object.ObjectMeta, c.client.RbacV1()
		switch object.Kind {
		case "Namespace":
			_, err = c.client.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: m}, create)
		case "ServiceAccount":
			_, err = c.client.CoreV1().ServiceAccounts(m.Namespace).Create(ctx, &corev1.ServiceAccount{ObjectMeta: m}, create)
		case "ClusterRole":
			grant(object.Rules)
			_, err = rbac.ClusterRoles().Create(ctx, &rbacv1.ClusterRole{ObjectMeta: m, Rules: object.Rules}, create)
		case "ClusterRoleBinding":
			_, err = rbac.ClusterRoleBindings().Create(ctx, &rbacv1.ClusterRoleBinding{ObjectMeta: m, RoleRef: object.RoleRef, Subjects: object.Subjects}, create)
		case "Role":
			grant(object.Rules)
			_, err = rbac.Roles(m.Namespace).Create(ctx, &rbacv1.Role{ObjectMeta: m, Rules: object.Rules}, create)
		case "RoleBinding":
			_, err = rbac.RoleBindings(m.Namespace).Create(ctx, &rbacv1.RoleBinding{ObjectMeta: m, RoleRef: object.RoleRef, Subjects: object.Subjects}, create)
		}
		if err != nil {
			c.t.Fatalf("%s %s: %v", object.Kind, m.Name, err)
		}
	}
	token, err := c.client.CoreV1().ServiceAccounts("podgate").CreateToken(ctx, "podgate", &authenticationv1.TokenRequest{}, create)
	must(c.t, err)
	return c.plane.Kubeconfig(c.plane.TokenFile("account", token.Status.Token)), granted
}

// member is a node of a cluster, with a network and nothing of podgate's.
type member struct {
	*runtime
	*cluster
	kubeconfig string
	granted    []string
}

func newMember(t *testing.T) *member {
	t.Helper()
	r := newRuntime(t)
	m := &member{runtime: r, cluster: r.cluster()}
	m.kubeconfig, m.granted = m.account()
	labels := map[string]string{"app": "podgate"}
	_, err := m.client.AppsV1().DaemonSets("podgate").Create(t.Context(), &appsv1.DaemonSet{
		ObjectMeta: metav1.ObjectMeta{Name: "podgate"},
		Spec: appsv1.DaemonSetSpec{
			Selector: &metav1.LabelSelector{MatchLabels: labels},
			Template: corev1.PodTemplateSpec{
				ObjectMeta: metav1.ObjectMeta{Labels: labels},
				Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "c", Image: "i"}}},
			},
		},
	}, metav1.CreateOptions{})
	must(t, err)
	return m
}

// installer is what runs beside the daemon in the DaemonSet's pods.
func (m *member) installer() *daemon {
	m.runtime.t.Helper()
	d := m.runtime.background(append([]string{
		"install", "--watch", "--from", filepath.Join(m.runtime.node.Dir, "source"), "--settle", "0s",
		"--uninstall-with", "podgate/podgate", "--kubeconfig", m.kubeconfig,
		"--cni-cache-dir", filepath.Join(m.runtime.node.Dir, "cni-cache"),
	}, m.flags...)...)
	m.runtime.until("installed", func() bool {
		return m.merged() && strings.Contains(d.logged(), "taken off this node if it is deleted")
	})
	return d
}

// merged tells whether podgate is part of the network.
func (m *member) merged() bool { return len(m.network().Plugins) == 2 }

const accountName = "system:serviceaccount:podgate:podgate"

func (m *member) used() (used []string) {
	for _, r := range m.plane.Requests(accountName) {
		used = append(used, r.Verb+" "+r.ObjectRef.Resource+"."+r.ObjectRef.APIGroup)
	}
	return used
}

// The rights of the manifest are those that are used: the daemon and the
// installer are refused nothing, and leave none unused.
func TestRights(t *testing.T) {
	m := newMember(t)
	daemon := m.runtime.background("sync", "--kubeconfig", m.kubeconfig, "--node-name", "n1")
	installer := m.installer()
	// A problem of an object makes an event, and the same again a patch of it.
	for range 2 {
		m.plane.Store("networkpolicies/shop/odd", []byte(`{"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
			"metadata": {"namespace": "shop", "name": "odd", "uid": "odd"},
			"spec": {"podSelector": {"matchExpressions": [{"key": "a", "operator": "Odd"}]}}}`))
		if !slices.Contains(m.used(), "create events.") {
			m.schedule("web", "web") // the event comes from nodes with pods that it concerns
		}
		m.runtime.until("a problem", func() bool { return len(m.runtime.status().Problems) > 0 })
		m.deletePolicy("odd")
		m.runtime.until("no problem", func() bool { return len(m.runtime.status().Problems) == 0 })
	}
	installer.end(t, unix.SIGTERM)
	daemon.end(t, unix.SIGTERM)
	if !m.merged() {
		t.Error("podgate was uninstalled although its DaemonSet is there")
	}
	used := m.used()
	for _, right := range m.granted {
		// Servers before 1.34 are asked for lists; later ones stream them.
		streamed := strings.Replace(right, "list ", "watch ", 1)
		if !slices.Contains(used, right) && !slices.Contains(used, streamed) {
			t.Errorf("%s is granted and not used", right)
		}
	}
	for _, r := range m.plane.Requests(accountName) {
		if code := r.ResponseStatus.Code; code == 401 || code == 403 {
			t.Errorf("%s %s was refused: %d", r.Verb, r.RequestURI, code)
		}
	}
}

// What the end of an installer means depends on why it ends.
func TestEndOfInstaller(t *testing.T) {
	m := newMember(t)
	ctx, now := t.Context(), metav1.DeleteOptions{}
	before, err := os.ReadFile(m.conf)
	must(t, err)

	// Nobody can tell: the rights are gone, or the server is.
	installer := m.installer()
	m.plane.Freeze()
	installer.end(t, unix.SIGTERM)
	m.plane.Thaw()
	if log := installer.logged(); !m.merged() || !strings.Contains(log, "nobody knows whether podgate was deleted") {
		t.Errorf("without an answer podgate did not stay:\n%s", log)
	}

	// Whatever lets its pods ask is deleted before the DaemonSet is.
	installer = m.installer()
	must(t, errors.Join(
		m.client.RbacV1().RoleBindings("podgate").Delete(ctx, "podgate", now),
		m.client.RbacV1().Roles("podgate").Delete(ctx, "podgate", now),
	))
	deleted := make(chan error)
	go func() {
		time.Sleep(time.Second)
		deleted <- m.client.AppsV1().DaemonSets("podgate").Delete(ctx, "podgate", now)
	}()
	installer.end(t, unix.SIGTERM)
	must(t, <-deleted)
	m.uninstalled(before)
}

// A namespace that is deleted may lose its pods before their DaemonSet.
func TestEndOfNamespace(t *testing.T) {
	m := newMember(t)
	before, err := os.ReadFile(m.conf)
	must(t, err)
	installer := m.installer()
	must(t, m.client.CoreV1().Namespaces().Delete(t.Context(), "podgate", metav1.DeleteOptions{}))
	installer.end(t, unix.SIGTERM)
	m.uninstalled(before)
}

// uninstalled checks that the node is as it was.
func (m *member) uninstalled(before []byte) {
	t := m.runtime.t
	t.Helper()
	after, err := os.ReadFile(m.conf)
	must(t, err)
	if !bytes.Equal(before, after) {
		t.Errorf("the network is\n%s\nnot\n%s", after, before)
	}
	if _, err := os.Stat(filepath.Join(m.runtime.node.Plugins, "podgate-cni")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("podgate-cni: %v", err)
	}
}
