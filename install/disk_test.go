// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package install

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// tmpfs is a file system of its own with a size in bytes, mounted nowhere: it
// ends with the test. Files are put in before it becomes read-only.
func tmpfs(t *testing.T, size int, readOnly bool, files map[string]string) (dir string) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("file systems need root")
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	fs, err := unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)
	must(err)
	defer unix.Close(fs)
	must(unix.FsconfigSetString(fs, "size", fmt.Sprint(size)))
	must(unix.FsconfigCreate(fs))
	fd, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, 0)
	must(err)
	t.Cleanup(func() { unix.Close(fd) })
	dir = fmt.Sprintf("/proc/%d/fd/%d/dir", os.Getpid(), fd)
	must(os.Mkdir(dir, 0o755))
	for name, text := range files {
		must(os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644))
	}
	if readOnly {
		must(unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}))
	}
	return dir
}

// A disk that is full or read-only fails with what could not be written and
// where, and leaves the network as it was.
func TestDisk(t *testing.T) {
	list := map[string]string{"10-net.conflist": bridgeList}
	big := strings.Repeat("x", 100<<10)
	for name, test := range map[string]struct {
		prepare func(*testing.T, *host)
		want    error
		says    string
	}{
		"full for binaries":      {func(t *testing.T, h *host) { h.BinDir = tmpfs(t, 64<<10, false, nil) }, unix.ENOSPC, "podgate-cni"},
		"read-only for binaries": {func(t *testing.T, h *host) { h.BinDir = tmpfs(t, 1<<20, true, nil) }, unix.EROFS, "podgate-cni"},
		"full for the configuration": {func(t *testing.T, h *host) {
			h.ConfDir = tmpfs(t, 3*os.Getpagesize(), false, map[string]string{"10-net.conflist": bridgeList, "rest": strings.Repeat("x", 2*os.Getpagesize())})
		}, unix.ENOSPC, "10-net.conflist"},
		"read-only for the configuration": {func(t *testing.T, h *host) { h.ConfDir = tmpfs(t, 1<<20, true, list) }, unix.EROFS, "10-net.conflist"},
		"full for the log": {func(t *testing.T, h *host) {
			h.StateDir = tmpfs(t, 2*os.Getpagesize(), false, map[string]string{"rest": strings.Repeat("x", 2*os.Getpagesize())})
		}, unix.ENOSPC, "log"},
		"read-only for the log": {func(t *testing.T, h *host) { h.StateDir = tmpfs(t, 1<<20, true, nil) }, unix.EROFS, "install.jsonl"},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			h.write(filepath.Join(h.Source, "podgate-cni"), big)
			test.prepare(t, h)
			before := h.tree()
			if err := Install(t.Context(), h.Options); err == nil || !strings.Contains(err.Error(), test.want.Error()) ||
				!strings.Contains(err.Error(), test.says) {
				t.Errorf("got %v, want %q saying %q", err, test.want, test.says)
			}
			if b, err := os.ReadFile(filepath.Join(h.ConfDir, "10-net.conflist")); err != nil || string(b) != bridgeList {
				t.Errorf("the list is %s (%v)", b, err)
			}
			if left := h.uninstall(); len(left) > 0 {
				t.Errorf("left: %q", left)
			}
			h.wantTree("uninstalled", h.tree(), before)
		})
	}
}
