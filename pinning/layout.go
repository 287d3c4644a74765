// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package pinning

import (
	"fmt"
	"path/filepath"
	"strconv"
	"strings"
)

// ABI is the version of the layout and meaning of the pinned maps. It is
// PODGATE_ABI of bpf/include/types.h.
const ABI = 1

// Layout says where an instance lives. Instances of different layouts do not
// meet. Zero fields mean the defaults.
type Layout struct {
	// BPFFS is the mount point of a BPF file system; "/sys/fs/bpf".
	BPFFS string
	// Name of the instance, a directory below it; "podgate".
	Name string
}

func (l Layout) withDefaults() Layout {
	if l.BPFFS == "" {
		l.BPFFS = "/sys/fs/bpf"
	}
	if l.Name == "" {
		l.Name = "podgate"
	}
	return l
}

func (l Layout) validate() error {
	if !filepath.IsAbs(l.BPFFS) {
		return fmt.Errorf("%w: bpffs %q is not an absolute path", ErrInvalid, l.BPFFS)
	}
	// The kernel refuses dots in names on a BPF file system.
	if strings.ContainsAny(l.Name, "/.") {
		return fmt.Errorf("%w: instance name %q contains '/' or '.'", ErrInvalid, l.Name)
	}
	return nil
}

// Dir is the directory of the instance.
func (l Layout) Dir() string { return filepath.Join(l.BPFFS, l.Name) }

// VersionDir holds everything of this binary's ABI.
func (l Layout) VersionDir() string { return filepath.Join(l.Dir(), "v"+strconv.Itoa(ABI)) }

// MapPath is the pin of a map.
func (l Layout) MapPath(name string) string {
	return filepath.Join(l.VersionDir(), "maps", name)
}

// ProgramPath is the pin of a program.
func (l Layout) ProgramPath(name string) string {
	return filepath.Join(l.VersionDir(), "progs", name)
}

// LinksDir holds a directory for each endpoint with tcx links.
func (l Layout) LinksDir() string { return filepath.Join(l.VersionDir(), "links") }

// LinkPath is the pin of the tcx link of an endpoint and a program.
func (l Layout) LinkPath(endpoint uint32, program string) string {
	return filepath.Join(l.endpointLinks(endpoint), program)
}

func (l Layout) endpointLinks(endpoint uint32) string {
	return filepath.Join(l.LinksDir(), strconv.FormatUint(uint64(endpoint), 10))
}

// natDir holds the netfilter links of after_nat, beside those of endpoints.
func (l Layout) natDir() string { return filepath.Join(l.LinksDir(), "netfilter") }

func (l Layout) natLink(hook string) string { return filepath.Join(l.natDir(), hook) }

// eventsDir is locked by the one consumer of the ring buffer.
func (l Layout) eventsDir() string { return filepath.Join(l.VersionDir(), "events") }
