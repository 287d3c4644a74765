// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package install

import (
	"context"
	"encoding/json"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/podgate/podgate/pinning"
)

const bridgeList = `{
  "cniVersion": "1.0.0",
  "name": "net",
  "plugins": [
    { "type": "bridge" }
  ]
}
`

const bridgeSingle = `{"cniVersion":"0.4.0","name":"old","type":"bridge"}`

// host is a root directory to install into, with directories for the pins: what
// is in them is tested with a kernel elsewhere.
type host struct {
	Options
	t    *testing.T
	root string
	// systemctl are the calls of it.
	systemctl []string
	running   bool
}

func newHost(t *testing.T) *host {
	t.Helper()
	h := &host{t: t, root: t.TempDir()}
	at := func(path string) string { return filepath.Join(h.root, path) }
	h.Options = Options{
		ConfDir: at("etc/cni/net.d"), BinDir: at("opt/cni/bin"), CommandDir: at("usr/local/bin"), StateDir: at("var/lib/podgate"),
		Source: t.TempDir(), CacheDir: at("var/lib/cni"), RunDir: at("run/podgate/podgate"),
		Pins: pinning.Options{Layout: pinning.Layout{BPFFS: at("sys/fs/bpf"), Name: "podgate"}},
		Unit: &Unit{
			Dir: at("etc/systemd/system"), Name: "podgate.service", PolicyDir: at("etc/podgate/policy.d"),
			Systemctl: func(_ context.Context, args ...string) error {
				h.systemctl = append(h.systemctl, strings.Join(args, " "))
				return nil
			},
		},
		Daemon:  func() (bool, error) { return h.running, nil },
		Version: "v1",
		ensure:  func(_ context.Context, o pinning.Options) error { return os.MkdirAll(o.Layout.VersionDir(), 0o700) },
		unpins:  func(_ context.Context, o pinning.Options) error { return os.RemoveAll(o.Layout.Dir()) },
	}
	for _, b := range []string{"podgate-cni", "podgate"} {
		h.write(filepath.Join(h.Source, b), "binary "+b)
	}
	h.file("etc/cni/net.d/10-net.conflist", bridgeList)
	h.file("var/lib/cni/.keep", "")
	h.file("sys/fs/bpf/.keep", "")
	h.file("run/.keep", "")
	return h
}

func (h *host) file(path, text string) { h.write(filepath.Join(h.root, path), text) }

func (h *host) write(path, text string) {
	h.t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		h.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o640); err != nil {
		h.t.Fatal(err)
	}
}

func (h *host) read(path string) string {
	h.t.Helper()
	b, err := os.ReadFile(filepath.Join(h.root, path))
	if err != nil {
		h.t.Fatal(err)
	}
	return string(b)
}

// tree is all there is below the root, with modes.
func (h *host) tree() map[string]string {
	h.t.Helper()
	all := map[string]string{}
	err := filepath.WalkDir(h.root, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		text := info.Mode().String()
		switch {
		case info.Mode().IsRegular():
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			text += " " + string(b)
		case info.Mode()&fs.ModeSymlink != 0:
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			text += " " + target
		}
		all[strings.TrimPrefix(path, h.root)] = text
		return nil
	})
	if err != nil {
		h.t.Fatal(err)
	}
	return all
}

// settled is the tree without the log, whose times differ.
func (h *host) settled() map[string]string {
	t := h.tree()
	delete(t, "/var/lib/podgate/"+logName)
	return t
}

func (h *host) wantTree(what string, got, want map[string]string) {
	h.t.Helper()
	for _, path := range slices.Sorted(maps.Keys(got)) {
		if want[path] == "" {
			h.t.Errorf("%s: %s is there: %s", what, path, got[path])
		} else if got[path] != want[path] {
			h.t.Errorf("%s: %s is %s, want %s", what, path, got[path], want[path])
		}
	}
	for _, path := range slices.Sorted(maps.Keys(want)) {
		if _, ok := got[path]; !ok {
			h.t.Errorf("%s: %s is not there", what, path)
		}
	}
}

func (h *host) install() {
	h.t.Helper()
	if err := Install(h.t.Context(), h.Options); err != nil {
		h.t.Fatal(err)
	}
}

func (h *host) uninstall() []string {
	h.t.Helper()
	left, err := Uninstall(h.t.Context(), h.Options)
	if err != nil {
		h.t.Fatal(err)
	}
	return left
}

// situations are nodes before podgate.
func situations() map[string]func(*host) {
	return map[string]func(*host){
		"nothing but a network": func(*host) {},
		"a single plugin": func(h *host) {
			h.directories()
			h.file("etc/cni/net.d/05-old.conf", bridgeSingle)
		},
		"files in the way": func(h *host) {
			h.directories()
			h.file("opt/cni/bin/podgate-cni", "of another origin")
			h.file("opt/cni/bin/podgate-ipam", "of another origin too")
			h.file("usr/local/bin/podgate", "binary podgate")
			h.file("etc/systemd/system/podgate.service", "somebody's own")
			h.file("etc/podgate/policy.d/mine.yaml", "{}")
		},
		"multus, with an attachment of before": func(h *host) {
			h.directories()
			h.file("opt/cni/bin/podgate-ipam", "of another origin")
			h.file("etc/cni/net.d/00-multus.conf", `{"name":"m","type":"multus","delegates":[`+bridgeList+`]}`)
			h.file("var/lib/cni/results/net-before-eth0", attached(bridgeList))
		},
		"a link for a file": func(h *host) {
			h.directories()
			h.file("etc/elsewhere", bridgeList)
			if err := os.Symlink("../../elsewhere", filepath.Join(h.ConfDir, "05-link.conflist")); err != nil {
				h.t.Fatal(err)
			}
		},
	}
}

// directories are there on most nodes.
func (h *host) directories() {
	for _, dir := range []string{"opt/cni/bin", "usr/local/bin", "etc/systemd/system/multi-user.target.wants", "etc/podgate/policy.d"} {
		h.file(dir+"/.keep", "")
	}
}

// attached is a file of libcni's cache.
func attached(list string) string {
	b, err := json.Marshal(map[string]any{
		"kind": "cniCacheV1", "containerId": "c", "ifName": "eth0", "networkName": "net", "config": []byte(list), "result": map[string]any{"cniVersion": "1.0.0"},
	})
	if err != nil {
		panic(err)
	}
	return string(b)
}
