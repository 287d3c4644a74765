// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package pinning

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Uninstall takes podgate off every interface of the network namespace and
// removes the instance with all its pins, whatever their ABI. Hooks go first, so
// that no packet of a pod is lost; from then on nothing is judged. Qdiscs stay:
// nobody knows who else counts on them. It returns the number of hooks that it
// took off, and does nothing when there is no instance.
//
// Whoever would attach hooks again has to be stopped before: the daemon, and
// runtimes that have podgate in their chain.
func Uninstall(ctx context.Context, o Options) (hooks int, err error) {
	o, err = o.withDefaults()
	if err != nil {
		return 0, err
	}
	l, err := acquire(ctx, o.Layout.Dir(), o.LockTimeout)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	defer func() { _ = l.release() }()
	maps, err := o.Layout.mapIDs()
	if err != nil {
		return 0, err
	}
	if hooks, err = detachAll(maps); err != nil {
		return hooks, err
	}
	links, err := filepath.Glob(filepath.Join(o.Layout.Dir(), "v*", "links", "*", "*"))
	if err != nil {
		return hooks, fmt.Errorf("list links: %w", err)
	}
	// Links that are pinned nowhere else end with their pins.
	if err := os.RemoveAll(o.Layout.Dir()); err != nil {
		return hooks, fmt.Errorf("remove instance: %w", err)
	}
	return hooks + len(links), nil
}

// mapIDs are the ids of all maps that an instance has pinned.
func (l Layout) mapIDs() (map[ebpf.MapID]struct{}, error) {
	paths, err := filepath.Glob(filepath.Join(l.Dir(), "*", "maps", "*"))
	if err != nil {
		return nil, fmt.Errorf("list maps: %w", err)
	}
	ids := map[ebpf.MapID]struct{}{}
	for _, path := range paths {
		m, err := ebpf.LoadPinnedMap(path, nil)
		if err != nil {
			return nil, fmt.Errorf("map %s: %w", path, err)
		}
		info, err := m.Info()
		if err := errors.Join(err, m.Close()); err != nil {
			return nil, fmt.Errorf("map %s: %w", path, err)
		}
		if id, ok := info.ID(); ok {
			ids[id] = struct{}{}
		}
	}
	return ids, nil
}

// detachAll removes our tc filters whose programs use one of the maps: those
// of other instances look the same otherwise.
func detachAll(maps map[ebpf.MapID]struct{}) (removed int, err error) {
	qdiscs, err := netlink.QdiscList(nil)
	if err != nil {
		return 0, fmt.Errorf("list qdiscs: %w", err)
	}
	uses := map[int]bool{}
	for _, q := range qdiscs {
		if q.Type() != "clsact" {
			continue
		}
		ifindex := q.Attrs().LinkIndex
		for direction, h := range hooks() {
			found, err := ourFilters(ifindex, h.parent)
			if err != nil {
				return removed, err
			}
			for _, f := range found {
				if _, known := uses[f.Id]; !known {
					if uses[f.Id], err = usesOneOf(ebpf.ProgramID(f.Id), maps); err != nil {
						return removed, err
					}
				}
				if !uses[f.Id] {
					continue
				}
				if err := deleteFilters(filter{ifindex, direction, f.Handle, nil}); err != nil {
					return removed, err
				}
				removed++
			}
		}
	}
	return removed, nil
}

// ourFilters are the filters of any instance at a hook.
func ourFilters(ifindex int, parent uint32) (ours []*netlink.BpfFilter, err error) {
	filters, err := netlink.FilterList(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: ifindex}}, parent)
	if isGone(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list filters of interface %d: %w", ifindex, err)
	}
	for _, f := range filters {
		b, ok := f.(*netlink.BpfFilter)
		// A stand-in has the next handle.
		if ok && b.Priority == filterPriority && (b.Handle == filterHandle || b.Handle == filterHandle+1) &&
			strings.HasPrefix(b.Name, "podgate_") {
			ours = append(ours, b)
		}
	}
	return ours, nil
}

func usesOneOf(program ebpf.ProgramID, maps map[ebpf.MapID]struct{}) (bool, error) {
	p, err := ebpf.NewProgramFromID(program)
	if errors.Is(err, unix.ENOENT) {
		return false, nil // Its filter went meanwhile.
	}
	if err != nil {
		return false, fmt.Errorf("program %d: %w", program, err)
	}
	info, err := p.Info()
	if err := errors.Join(err, p.Close()); err != nil {
		return false, fmt.Errorf("program %d: %w", program, err)
	}
	ids, _ := info.MapIDs()
	return slices.ContainsFunc(ids, func(id ebpf.MapID) bool {
		_, ok := maps[id]
		return ok
	}), nil
}
