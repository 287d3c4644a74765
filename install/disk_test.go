// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package install

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// disk is a file system of its own, mounted nowhere: it ends with the test.
type disk struct {
	t  *testing.T
	fd int
	// dir is a directory on it.
	dir string
}

// newDisk makes one with a size in bytes, and files.
func newDisk(t *testing.T, size int, files map[string]string) *disk {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("file systems need root")
	}
	d := &disk{t: t}
	fs, err := unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)
	d.must(err)
	defer unix.Close(fs)
	d.must(unix.FsconfigSetString(fs, "size", fmt.Sprint(size)))
	d.must(unix.FsconfigCreate(fs))
	d.fd, err = unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, 0)
	d.must(err)
	t.Cleanup(func() { unix.Close(d.fd) })
	d.dir = fmt.Sprintf("/proc/%d/fd/%d/dir", os.Getpid(), d.fd)
	d.must(os.Mkdir(d.dir, 0o755))
	for name, text := range files {
		d.must(os.WriteFile(filepath.Join(d.dir, name), []byte(text), 0o644))
	}
	return d
}

func (d *disk) must(err error) {
	d.t.Helper()
	if err != nil {
		d.t.Fatal(err)
	}
}

// readOnly makes it read-only, and ends that.
func (d *disk) readOnly() (end func()) {
	d.t.Helper()
	set := func(a unix.MountAttr) { d.must(unix.MountSetattr(d.fd, "", unix.AT_EMPTY_PATH, &a)) }
	set(unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY})
	return func() { set(unix.MountAttr{Attr_clr: unix.MOUNT_ATTR_RDONLY}) }
}

// full fills it with a file, and ends that.
func (d *disk) full() (end func()) {
	d.t.Helper()
	filler := filepath.Join(filepath.Dir(d.dir), "filler")
	f, err := os.Create(filler)
	d.must(err)
	page := make([]byte, os.Getpagesize())
	for err == nil {
		_, err = f.Write(page)
	}
	if !errors.Is(err, unix.ENOSPC) {
		d.t.Fatal(err)
	}
	d.must(f.Close())
	return func() { d.must(os.Remove(filler)) }
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
		"full for binaries":      {func(t *testing.T, h *host) { h.BinDir = newDisk(t, 64<<10, nil).dir }, unix.ENOSPC, "podgate-cni"},
		"read-only for binaries": {func(t *testing.T, h *host) { d := newDisk(t, 1<<20, nil); d.readOnly(); h.BinDir = d.dir }, unix.EROFS, "podgate-cni"},
		"full for the configuration": {func(t *testing.T, h *host) { d := newDisk(t, 1<<20, list); d.full(); h.ConfDir = d.dir },
			unix.ENOSPC, "10-net.conflist"},
		"read-only for the configuration": {func(t *testing.T, h *host) { d := newDisk(t, 1<<20, list); d.readOnly(); h.ConfDir = d.dir },
			unix.EROFS, "10-net.conflist"},
		"full for the log":      {func(t *testing.T, h *host) { d := newDisk(t, 1<<20, nil); d.full(); h.StateDir = d.dir }, unix.ENOSPC, "install.jsonl"},
		"read-only for the log": {func(t *testing.T, h *host) { d := newDisk(t, 1<<20, nil); d.readOnly(); h.StateDir = d.dir }, unix.EROFS, "install.jsonl"},
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

// The same for uninstall: what it has come to is done, and the rest when there
// is room again.
func TestDiskUninstall(t *testing.T) {
	full, readOnly := (*disk).full, (*disk).readOnly
	of := func(dir func(*host) *string, files map[string]string) func(*host) *disk {
		return func(h *host) *disk {
			d := newDisk(h.t, 1<<20, files)
			*dir(h) = d.dir
			return d
		}
	}
	configuration := of(func(h *host) *string { return &h.ConfDir }, map[string]string{"10-net.conflist": bridgeList})
	binaries := of(func(h *host) *string { return &h.BinDir }, nil)
	state := of(func(h *host) *string { return &h.StateDir }, nil)
	for name, test := range map[string]struct {
		on     func(*host) *disk
		end    func(*disk) func()
		want   error // Nothing where it needs no room.
		says   string
		merged bool
	}{
		"full for the configuration":      {configuration, full, unix.ENOSPC, "10-net.conflist", true},
		"read-only for the configuration": {configuration, readOnly, unix.EROFS, "10-net.conflist", true},
		"full for binaries":               {binaries, full, nil, "", false},
		"read-only for binaries":          {binaries, readOnly, unix.EROFS, "podgate-ipam", false},
		"full for the log":                {state, full, nil, "", false},
		"read-only for the log":           {state, readOnly, unix.EROFS, "install.jsonl", false},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			d := test.on(h)
			before := h.tree()
			h.install()
			end := test.end(d)
			_, err := Uninstall(t.Context(), h.Options)
			if !errors.Is(err, test.want) || err != nil && !strings.Contains(err.Error(), test.says) {
				t.Errorf("got %v, want %v saying %q", err, test.want, test.says)
			}
			h.wantUsable("not uninstalled to the end")
			b, err := os.ReadFile(filepath.Join(h.ConfDir, "10-net.conflist"))
			if err != nil {
				t.Fatal(err)
			}
			if got := strings.Contains(string(b), "podgate-cni"); got != test.merged {
				t.Errorf("podgate is in the list: %t, want %t\n%s", got, test.merged, b)
			}
			end()
			if left := h.uninstall(); len(left) > 0 {
				t.Errorf("left: %q", left)
			}
			h.wantTree("uninstalled", h.tree(), before)
			if b, err := os.ReadFile(filepath.Join(h.ConfDir, "10-net.conflist")); err != nil || string(b) != bridgeList {
				t.Errorf("the list is %s (%v)", b, err)
			}
		})
	}
}

// A watcher that has no room to put the entry back says so, leaves the network
// as its owner wrote it, and goes on trying.
func TestDiskWatch(t *testing.T) {
	h := newHost(t)
	d := newDisk(t, 1<<20, map[string]string{"10-net.conflist": bridgeList, "theirs": bridgeList})
	h.ConfDir = d.dir
	list := filepath.Join(d.dir, "10-net.conflist")
	merged := func() bool {
		b, err := os.ReadFile(list)
		if err != nil {
			t.Fatal(err)
		}
		return strings.Contains(string(b), "podgate-cni")
	}
	p := quick()
	p.rescan = 10 * time.Millisecond
	w := watch(h, p)
	w.until("installed", merged)
	d.must(os.Link(list, filepath.Join(d.dir, "kept"))) // Or the rename would make room.
	enough := d.full()
	d.must(os.Rename(filepath.Join(d.dir, "theirs"), list))
	w.until("said", func() bool {
		log := w.logged()
		return strings.Contains(log, "podgate is not part of the network") && strings.Contains(log, "write "+list) &&
			strings.Contains(log, unix.ENOSPC.Error())
	})
	if b, err := os.ReadFile(list); err != nil || string(b) != bridgeList {
		t.Errorf("the list is %s (%v)", b, err)
	}
	enough()
	w.until("put back", merged)
}
