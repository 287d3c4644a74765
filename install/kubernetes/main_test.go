// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"os"
	"os/exec"
	"strings"
	"testing"

	"helm.sh/helm/v4/pkg/chart/v2/loader"
	"sigs.k8s.io/yaml"
)

// The manifests are what the chart makes.
func TestManifestsAreUpToDate(t *testing.T) {
	for file, values := range manifests() {
		want, err := render(release, values)
		if err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s is not what the chart makes: run \"make manifests\"", file)
		}
	}
}

// What is released together says the same of itself: the chart, the image that
// it names, and what "make" builds.
func TestVersion(t *testing.T) {
	b, err := os.ReadFile("../../VERSION")
	if err != nil {
		t.Fatal(err)
	}
	version := strings.TrimSuffix(string(b), "\n")
	chart, err := loader.Load(release)
	if err != nil {
		t.Fatal(err)
	}
	if m := chart.Metadata; m.Version != version || m.AppVersion != version {
		t.Errorf("the chart is version %s of podgate %s, want %s", m.Version, m.AppVersion, version)
	}
	image := chart.Values["image"].(map[string]any)["repository"].(string) + ":" + version
	for file := range manifests() {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(b)) {
			if key, value, _ := strings.Cut(strings.TrimSpace(line), ": "); key == "image" && value != image {
				t.Errorf("%s has the image %s, want %s", file, value, image)
			}
		}
	}
	// Whatever this test was called with is not what a release is made with.
	cmd := exec.CommandContext(t.Context(), "env", "-u", "VERSION", "-u", "IMAGE", "-u", "MAKEFLAGS", "make", "-C", "../..", "--dry-run", "image")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("make: %v\n%s", err, out)
	}
	for _, want := range []string{"-X main.version=" + version + "' ", "-name '" + image + "' ", "-version '" + version + "' "} {
		if !strings.Contains(string(out), want) {
			t.Errorf("make has no %q in\n%s", want, out)
		}
	}
}

// documents of what the chart makes of values, by kind and name.
func documents(t *testing.T, values map[string]any) map[string]map[string]any {
	t.Helper()
	text, err := render(release, values)
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]map[string]any{}
	for _, document := range strings.Split(string(text), "\n---\n")[1:] {
		var object map[string]any
		if err := yaml.UnmarshalStrict([]byte(document), &object); err != nil {
			t.Fatalf("%v in\n%s", err, document)
		}
		name := object["metadata"].(map[string]any)["name"].(string)
		all[object["kind"].(string)+" "+name] = object
	}
	return all
}

func text(t *testing.T, object any) string {
	t.Helper()
	b, err := yaml.Marshal(object)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// Each value shows in what is made, and nothing but YAML comes of it.
func TestValues(t *testing.T) {
	for value, test := range map[string]struct {
		set  map[string]any
		says []string
	}{
		"image":    {map[string]any{"image": map[string]any{"repository": "r/p", "tag": "v7"}}, []string{"image: r/p:v7"}},
		"pull":     {map[string]any{"imagePullSecrets": []any{map[string]any{"name": "key"}}}, []string{"imagePullSecrets:\n      - name: key"}},
		"options":  {map[string]any{"cni": map[string]any{"options": map[string]any{"mode": "open"}}}, []string{`--options={"mode":"open"}`}},
		"conflist": {map[string]any{"cni": map[string]any{"conflist": "/etc/cni/net.d/x"}}, []string{"--conflist=/etc/cni/net.d/x"}},
		"places": {map[string]any{"cni": map[string]any{"confDir": "/c", "binDir": "/b", "cacheDir": "/v", "netnsDir": "/n"}, "bpffs": "/f", "stateDir": "/s", "runDir": "/r"},
			[]string{"--conf-dir=/c", "--bin-dir=/b", "--cni-cache-dir=/v", "path: /n", "--bpffs=/f", "--state-dir=/s", "--run-dir=/r/podgate", "mountPath: /c", "path: /s"}},
		"capacity":   {map[string]any{"capacity": map[string]any{"flows": 524288.0, "eventBytes": 4194304.0}}, []string{"--capacity-flows=524288", "--capacity-event-bytes=4194304"}},
		"mount":      {map[string]any{"mountBPFFS": true}, []string{"- init\n        - --bpffs=/sys/fs/bpf", "privileged: true", "mountPropagation: Bidirectional"}},
		"audit":      {map[string]any{"auditPods": true}, []string{"--audit-pods"}},
		"metrics":    {map[string]any{"metrics": map[string]any{"host": "127.0.0.1", "port": 1234}}, []string{"--metrics=127.0.0.1:1234", "containerPort: 1234"}},
		"probes":     {map[string]any{"installer": map[string]any{"probePort": 1235}}, []string{"--probes=127.0.0.1:1235", "port: 1235"}},
		"API server": {map[string]any{"apiServer": map[string]any{"host": "fd00::1", "port": "6443"}}, []string{"value: fd00::1", `value: "6443"`}},
		"log":        {map[string]any{"logLevel": "debug"}, []string{"--log-level=debug"}},
		"memory":     {map[string]any{"extraCapabilities": []any{"SYS_RESOURCE"}}, []string{"- SYS_RESOURCE"}},
		"pods": {map[string]any{"podAnnotations": map[string]any{"a": "b"}, "podLabels": map[string]any{"c": "d"}, "priorityClassName": "p", "affinity": map[string]any{"nodeAffinity": map[string]any{}},
			"tolerations": []any{map[string]any{"key": "k"}}}, []string{"a: b", "c: d", "priorityClassName: p", "nodeAffinity: {}", "- key: k"}},
		"updates": {map[string]any{"updateStrategy": map[string]any{"type": "OnDelete", "rollingUpdate": nil}}, []string{"type: OnDelete"}},
	} {
		t.Run(value, func(t *testing.T) {
			got := text(t, documents(t, test.set)["DaemonSet podgate"])
			for _, want := range test.says {
				if !strings.Contains(got, want) {
					t.Errorf("no %q in\n%s", want, got)
				}
			}
		})
	}
}

// What is not asked for is not there, the rights for it neither.
func TestParts(t *testing.T) {
	for name, test := range map[string]struct {
		values    map[string]any
		has, lack []string
	}{
		"defaults":  {nil, []string{"DaemonSet podgate", "ClusterRole podgate", "Role podgate", "ServiceAccount podgate"}, []string{"Namespace podgate", "DaemonSet podgate-uninstall"}},
		"namespace": {map[string]any{"namespace": map[string]any{"create": true}}, []string{"Namespace podgate"}, nil},
		"keep":      {map[string]any{"uninstallOnDelete": false}, []string{"DaemonSet podgate", "ClusterRole podgate"}, []string{"Role podgate", "RoleBinding podgate"}},
		"uninstall": {map[string]any{"uninstall": true}, []string{"DaemonSet podgate-uninstall"}, []string{"DaemonSet podgate", "ClusterRole podgate", "ServiceAccount podgate"}},
	} {
		t.Run(name, func(t *testing.T) {
			all := documents(t, test.values)
			for _, want := range test.has {
				if all[want] == nil {
					t.Errorf("no %s", want)
				}
			}
			for _, not := range test.lack {
				if all[not] != nil {
					t.Errorf("%s is there", not)
				}
			}
		})
	}
	keep := text(t, documents(t, map[string]any{"uninstallOnDelete": false})["DaemonSet podgate"])
	if strings.Contains(keep, "--uninstall-with") {
		t.Error("what is to be kept is uninstalled")
	}
}

// Nothing is privileged, and nothing of a container's own can be written.
func TestContainersAreConfined(t *testing.T) {
	for _, values := range manifests() {
		for name, object := range documents(t, values) {
			if !strings.HasPrefix(name, "DaemonSet") {
				continue
			}
			got := text(t, object)
			containers := strings.Count(got, "imagePullPolicy:")
			for what, want := range map[string]int{"privileged:": 0, "hostPID:": 0, "readOnlyRootFilesystem: true": containers, "drop:\n            - ALL": containers} {
				if n := strings.Count(got, what); n != want {
					t.Errorf("%s has %q %d times, not %d", name, what, n, want)
				}
			}
		}
	}
}

func TestTheChartLoads(t *testing.T) {
	chart, err := loader.Load(release)
	if err != nil {
		t.Fatal(err)
	}
	if err := chart.Validate(); err != nil {
		t.Error(err)
	}
}
