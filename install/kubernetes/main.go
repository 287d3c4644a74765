// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

// Command kubernetes makes the manifests for kubectl out of the Helm chart in
// podgate: podgate.yaml, and podgate-uninstall.yaml, which takes it off all
// nodes again. It is a module of its own because of helm.
package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"helm.sh/helm/v4/pkg/chart/common"
	"helm.sh/helm/v4/pkg/chart/common/util"
	"helm.sh/helm/v4/pkg/chart/v2/loader"
	"helm.sh/helm/v4/pkg/engine"
)

// release is the name of what the manifests make, and of its namespace.
const release = "podgate"

// manifests by file: the values that differ from the chart's own.
func manifests() map[string]map[string]any {
	namespace := map[string]any{"create": true}
	return map[string]map[string]any{
		"podgate.yaml":           {"namespace": namespace},
		"podgate-uninstall.yaml": {"namespace": namespace, "uninstall": true},
	}
}

func main() {
	if err := run("."); err != nil {
		fmt.Fprintln(os.Stderr, "manifests:", err)
		os.Exit(1)
	}
}

// run writes the manifests to the directory that the chart is in.
func run(dir string) error {
	for file, values := range manifests() {
		text, err := render(filepath.Join(dir, release), values)
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, file), text, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// render is what the chart in a directory makes of values, in an order in which
// it can be applied.
func render(dir string, values map[string]any) ([]byte, error) {
	chart, err := loader.Load(dir)
	if err != nil {
		return nil, fmt.Errorf("chart %s: %w", dir, err)
	}
	options := common.ReleaseOptions{Name: release, Namespace: release, Revision: 1, IsInstall: true}
	all, err := util.ToRenderValues(chart, values, options, common.DefaultCapabilities)
	if err != nil {
		return nil, fmt.Errorf("values: %w", err)
	}
	files, err := engine.Render(chart, all)
	if err != nil {
		return nil, fmt.Errorf("chart %s: %w", dir, err)
	}
	b := bytes.NewBufferString("# Made of the chart in install/kubernetes/podgate: \"make manifests\".\n")
	for _, name := range []string{"namespace", "rbac", "daemonset", "uninstall"} {
		text := strings.TrimSpace(files[release+"/templates/"+name+".yaml"])
		if text == "" {
			continue
		}
		fmt.Fprintf(b, "---\n%s\n", strings.TrimPrefix(text, "---\n"))
	}
	return b.Bytes(), nil
}
