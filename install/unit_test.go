// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package install

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/podgate/podgate/test/need"
)

// systemd itself reads the unit, also with paths that need quoting.
func TestUnit(t *testing.T) {
	const checker = "systemd-analyze" //nolint:misspell // its name
	need.Tools(t, checker)
	h := newHost(t)
	h.CommandDir = filepath.Join(h.root, `local bin`)
	h.Unit.PolicyDir = filepath.Join(h.root, `50% "off" $HOME`)
	h.install()
	// systemd looks whether the command can be run.
	if err := os.Chmod(filepath.Join(h.CommandDir, "podgate"), 0o755); err != nil {
		t.Fatal(err)
	}
	out, err := exec.CommandContext(t.Context(), checker, "verify", "--man=no", h.Unit.path()).CombinedOutput()
	if err != nil || len(out) > 0 {
		t.Errorf("%s: %v\n%s", checker, err, out)
	}
	text := h.read("etc/systemd/system/podgate.service")
	if want := ` --policy-dir "` + h.root + `/50%% \"off\" $$HOME" --bpffs `; !strings.Contains(text, want) {
		t.Errorf("%q is not in\n%s", want, text)
	}
	if want := `ExecStart="` + h.root + `/local bin/podgate" sync `; !strings.Contains(text, want) {
		t.Errorf("%q is not in\n%s", want, text)
	}
	// By default systemd gives up after five starts within ten seconds.
	if !strings.Contains(text, "\nStartLimitIntervalSec=0\n\n[Service]\n") {
		t.Errorf("systemd would give up on\n%s", text)
	}
	link := filepath.Join(h.Unit.Dir, "multi-user.target.wants", "podgate.service")
	if unit, err := os.Stat(link); err != nil || !unit.Mode().IsRegular() {
		t.Errorf("%s does not lead to the unit: %v", link, err)
	}
}
