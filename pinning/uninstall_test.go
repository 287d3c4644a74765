// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package pinning_test

import (
	"errors"
	"io/fs"
	"os"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/podgate/podgate/pinning"
)

func (l *lab) uninstall() (hooks int) {
	l.t.Helper()
	l.do(func() (err error) {
		hooks, err = pinning.Uninstall(l.t.Context(), l.options)
		return err
	})
	return hooks
}

// What others have on the interface stays, and so does another instance of
// ours, though its filters look the same.
func TestUninstall(t *testing.T) {
	for _, kind := range attachKinds(t) {
		t.Run(kind.String(), func(t *testing.T) {
			l := newLab(t)
			ours, theirs := l.veth("a"), l.veth("b")
			p := other(t, tcActUnspec)
			for _, host := range []netlink.Link{ours, theirs} {
				l.clsact(host)
				l.filterOf(host, netlink.HANDLE_MIN_INGRESS, 10, 1, p)
			}
			r := request(ours, "10.0.0.1")
			r.Attach = kind
			l.add(r)

			second := *l
			second.options.Layout.Name = "second"
			second.state = second.ensure()
			second.add(request(theirs, "10.0.0.1"))

			if n := l.uninstall(); n != 2 {
				t.Errorf("%d hooks were taken off, want 2", n)
			}
			l.wantHooked(ours, "other by clsact")
			l.wantHooked(theirs, "podgate_to_pod by clsact", "podgate_from_pod by clsact", "other by clsact")
			if _, err := os.Stat(l.options.Layout.Dir()); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%s: %v", l.options.Layout.Dir(), err)
			}
			if n := l.uninstall(); n != 0 {
				t.Errorf("done again it took off %d hooks", n)
			}
			if err := second.check(request(theirs).Key, pinning.Endpoint{}); err != nil {
				t.Error(err)
			}
		})
	}
}

// The pins of another version go too: whoever removes podgate need not know
// which one is there.
func TestUninstallOtherABI(t *testing.T) {
	l := newLab(t)
	host := l.veth("a")
	l.add(request(host, "10.0.0.1"))
	if err := os.Rename(l.options.Layout.VersionDir(), l.options.Layout.Dir()+"/v0"); err != nil {
		t.Fatal(err)
	}
	if n := l.uninstall(); n != 2 {
		t.Errorf("%d hooks were taken off, want 2", n)
	}
	l.wantHooked(host)
}
