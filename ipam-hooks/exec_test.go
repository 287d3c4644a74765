// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package ipamhooks

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/types"
)

// script makes an executable plugin in a directory of its own.
func script(t *testing.T, name, body string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\n"+body), 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestProcess(t *testing.T) {
	t.Setenv("CNI_COMMAND", "ADD")
	t.Setenv("CNI_IFNAME", "eth7")
	empty := t.TempDir()
	dir := script(t, "ipam", `echo "$CNI_COMMAND $CNI_IFNAME $(cat)"; echo noise >&2`)
	var stderr bytes.Buffer
	stdout, err := Process(empty+":"+dir, &stderr)(t.Context(), "ipam", "DEL", []byte("{}"))
	if err != nil {
		t.Fatal(err)
	}
	if got := string(stdout); got != "DEL eth7 {}\n" {
		t.Errorf("plugin saw %q", got)
	}
	if stderr.String() != "noise\n" {
		t.Errorf("stderr is %q", stderr.String())
	}
}

func TestProcessErrors(t *testing.T) {
	for name, test := range map[string]struct {
		plugin, body string
		code         uint
		says         string
	}{
		"error of the plugin": {"ipam", `echo '{"code": 11, "msg": "later", "details": "d"}'; exit 1`, types.ErrTryAgainLater, "later"},
		"no error text":       {"ipam", `exit 3`, types.ErrInternal, "exit status 3"},
		"text that is no CNI": {"ipam", `echo oops; exit 1`, types.ErrInternal, "oops"},
		"no such plugin":      {"other", ``, types.ErrInvalidNetworkConfig, "no plugin other in CNI_PATH="},
		"path for a name":     {"../ipam", ``, types.ErrInvalidNetworkConfig, "is not the name of a plugin"},
		"no name":             {"", ``, types.ErrInvalidNetworkConfig, "is not the name of a plugin"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := script(t, "ipam", test.body)
			_, err := Process(dir, &bytes.Buffer{})(t.Context(), test.plugin, "ADD", nil)
			var e *types.Error
			if !errors.As(err, &e) || e.Code != test.code || !strings.Contains(err.Error(), test.says) {
				t.Errorf("got %v, want code %d saying %q", err, test.code, test.says)
			}
		})
	}
}
