// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/podgate/podgate/syncd/status"
)

func TestOriginComplete(t *testing.T) {
	host, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	here, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name, environment string
		give, want        status.Origin
	}{
		{name: "the host's name", give: status.Origin{PolicyDir: "/p"}, want: status.Origin{Node: host, PolicyDir: "/p"}},
		{name: "$NODE_NAME", environment: "n1", give: status.Origin{PolicyDir: "/p"}, want: status.Origin{Node: "n1", PolicyDir: "/p"}},
		{name: "--node-name", environment: "n1", give: status.Origin{Node: "n2", PolicyDir: "/p"}, want: status.Origin{Node: "n2", PolicyDir: "/p"}},
		{
			name: "a relative path", environment: "n1", give: status.Origin{Kubeconfig: "k"},
			want: status.Origin{Node: "n1", Kubeconfig: filepath.Join(here, "k")},
		},
		{name: "in the cluster", environment: "n1", give: status.Origin{Kubeconfig: "in-cluster"}, want: status.Origin{Node: "n1", Kubeconfig: "in-cluster"}},
	} {
		o := origin{tt.give}
		err := o.complete(func(name string) string { return map[string]string{"NODE_NAME": tt.environment}[name] })
		if err != nil || o.Origin != tt.want {
			t.Errorf("%s: %+v, %v, want %+v", tt.name, o.Origin, err, tt.want)
		}
	}
	if err := (&origin{}).complete(os.Getenv); err == nil {
		t.Error("nothing named is no error")
	}
}

func TestSyncNeedsOneOrigin(t *testing.T) {
	for _, args := range [][]string{
		{"sync"}, {"sync", "--kubeconfig", ""}, {"sync", "--kubeconfig", "k", "--policy-dir", "p"}, {"sync", "--kubeconfig", "/does/not/exist", "--run-dir", t.TempDir()},
	} {
		if code := run(t.Context(), env{Stdout: os.Stdout, Stderr: t.Output(), Getenv: func(string) string { return "" }}, args); code != 1 {
			t.Errorf("podgate %v: exit code %d", args, code)
		}
	}
}
