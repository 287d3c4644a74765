// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package pinning

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync/atomic"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/podgate/podgate/bpf"
)

// ServicesMode is when packets to Services are judged; enum services_mode of
// bpf/include/types.h.
type ServicesMode uint32

// Before translation a Service is judged by all of its backends, after it by
// the one that was chosen.
const (
	ServicesNone   = ServicesMode(bpf.DatapathServicesModeSERVICES_NONE)
	ServicesBefore = ServicesMode(bpf.DatapathServicesModeSERVICES_BEFORE)
	ServicesAfter  = ServicesMode(bpf.DatapathServicesModeSERVICES_AFTER)
)

func (m ServicesMode) String() string {
	switch m {
	case ServicesNone:
		return "none"
	case ServicesBefore:
		return "before translation"
	case ServicesAfter:
		return "after translation"
	}
	return fmt.Sprintf("mode-%d", uint32(m))
}

// natHook is where after_nat sees packets: behind DNAT, whose priority is -100,
// and before filters, at 0, which reject what nothing translates.
type natHook struct {
	name   string
	family link.NetfilterProtocolFamily
	hook   link.NetfilterInetHook
}

func natHooks() []natHook {
	return []natHook{
		{"forward_ipv4", link.NetfilterProtoIPv4, link.NetfilterInetForward},
		{"forward_ipv6", link.NetfilterProtoIPv6, link.NetfilterInetForward},
		{"local_in_ipv4", link.NetfilterProtoIPv4, link.NetfilterInetLocalIn},
		{"local_in_ipv6", link.NetfilterProtoIPv6, link.NetfilterInetLocalIn},
	}
}

// A hook has one program at a priority, and a link cannot be given another
// program: the next one takes another of these.
const (
	natPriority   = -50
	natPriorities = 10
)

// ServicesMode is the mode in force.
func (s *State) ServicesMode() (ServicesMode, error) {
	sh, err := s.memory()
	if err != nil {
		return ServicesNone, err
	}
	return ServicesMode(atomic.LoadUint32(&sh.state.Services)), nil
}

// setServicesMode puts a mode into force. Links are attached before it says so.
func (s *State) setServicesMode(m ServicesMode) error {
	sh, err := s.memory()
	if err != nil {
		return err
	}
	if atomic.SwapUint32(&sh.state.Services, uint32(m)) != uint32(m) {
		sh.bumpEpoch()
		s.log.Info("Services are judged", "when", m)
	}
	return nil
}

// afterNAT makes after_nat judge what is translated. The error says why it
// cannot be.
func (s *State) afterNAT() error {
	if s.private {
		return fmt.Errorf("%w: nothing is attached to a private instance", errors.ErrUnsupported)
	}
	if _, err := netlink.LinkByName(ipvsInterface); err == nil {
		return fmt.Errorf("%w: IPVS, which %s is a sign of, translates where no program can see it", errors.ErrUnsupported, ipvsInterface)
	} else if !isNoLink(err) {
		return fmt.Errorf("look for %s: %w", ipvsInterface, err)
	}
	p, err := s.program(bpf.ServiceProgAfterNat)
	if errors.Is(err, ErrNotInstalled) {
		s.prepareServices()
		if s.noAfterNAT != nil {
			return s.noAfterNAT
		}
		if err := s.repin(bpf.ServiceProgAfterNat, func(path string) error { return s.prepared.Pin(path) }); err != nil {
			return err
		}
		_ = s.prepared.Close()
		s.prepared = nil
		p, err = s.program(bpf.ServiceProgAfterNat)
	}
	if err != nil {
		return err
	}
	_, err = s.attachAfterNAT(p)
	return err
}

// prepareServices verifies after_nat if it is not pinned yet: that takes longer
// than others should wait for the lock. A kernel that cannot have it says so
// here, once.
func (s *State) prepareServices() {
	if s.private || s.prepared != nil || s.noAfterNAT != nil {
		return
	}
	if _, err := s.program(bpf.ServiceProgAfterNat); errors.Is(err, ErrNotInstalled) {
		s.prepared, s.noAfterNAT = s.verifyAfterNAT()
	}
}

func (s *State) verifyAfterNAT() (*ebpf.Program, error) {
	if err := unlockMemory(); err != nil {
		return nil, err
	}
	spec, err := bpf.LoadService()
	if err != nil {
		return nil, fmt.Errorf("read programs: %w", err)
	}
	pinned := map[string]*ebpf.Map{}
	for name := range spec.Maps {
		if unpinned(name) {
			continue
		}
		if pinned[name], err = s.m(name); err != nil {
			return nil, err
		}
		spec.Maps[name].MaxEntries = pinned[name].MaxEntries()
	}
	if err := setConstants(spec, pinned[bpf.DatapathMapGates].MaxEntries()); err != nil {
		return nil, err
	}
	coll, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: pinned})
	if err != nil {
		return nil, fmt.Errorf("load %s: %w", bpf.ServiceProgAfterNat, err)
	}
	defer coll.Close()
	return coll.DetachProgram(bpf.ServiceProgAfterNat), nil
}

// attachAfterNAT attaches the program where it is not yet, and names the hooks.
// What ran there goes once the new one is there.
func (s *State) attachAfterNAT(p *ebpf.Program) (attached []string, err error) {
	if err := os.Mkdir(s.layout.natDir(), 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("pin links: %w", err)
	}
	for _, h := range natHooks() {
		if s.checkNAT(h, p) == nil {
			continue
		}
		if err := s.attachNAT(h, p); err != nil {
			return attached, err
		}
		attached = append(attached, h.name)
	}
	return attached, nil
}

func (s *State) attachNAT(h natHook, p *ebpf.Program) error {
	var l link.Link
	err := error(unix.EBUSY)
	for i := int32(0); i < natPriorities && (errors.Is(err, unix.EBUSY) || errors.Is(err, unix.EEXIST)); i++ {
		l, err = link.AttachNetfilter(link.NetfilterOptions{
			Program: p, ProtocolFamily: h.family, Hook: h.hook, Priority: natPriority - i,
		})
	}
	if err != nil {
		return fmt.Errorf("attach %s to %s: %w", bpf.ServiceProgAfterNat, h.name, err)
	}
	defer func() { _ = l.Close() }()
	path := s.layout.natLink(h.name)
	building := path + "_new"
	if err := os.RemoveAll(building); err != nil {
		return fmt.Errorf("clean up: %w", err)
	}
	if err := l.Pin(building); err != nil {
		return fmt.Errorf("pin link %s: %w", building, err)
	}
	if err := os.Rename(building, path); err != nil {
		return fmt.Errorf("publish link %s: %w", path, err)
	}
	return nil
}

// checkNAT tells what is wrong with the link of a hook.
func (s *State) checkNAT(h natHook, p *ebpf.Program) error {
	path := s.layout.natLink(h.name)
	l, err := link.LoadPinnedLink(path, nil)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: link %s is gone", ErrDiffers, path)
	}
	if err != nil {
		return fmt.Errorf("link %s: %w", path, err)
	}
	defer func() { _ = l.Close() }()
	info, err := l.Info()
	if err != nil {
		return fmt.Errorf("link %s: %w", path, err)
	}
	pinfo, err := p.Info()
	if err != nil {
		return fmt.Errorf("info of %s: %w", p, err)
	}
	if id, _ := pinfo.ID(); info.Program != id {
		return fmt.Errorf("%w: link %s runs program %d, not %d", ErrDiffers, path, info.Program, id)
	}
	if err := isAttached(h, p, info); err != nil {
		return fmt.Errorf("link %s: %w", path, err)
	}
	return nil
}

// isAttached tells whether a link still is where it says. Detached by force it
// goes on saying so; but while it is there nobody else gets its priority.
func isAttached(h natHook, p *ebpf.Program, info *link.Info) error {
	at := info.Netfilter()
	if at == nil {
		return nil
	}
	l, err := link.AttachNetfilter(link.NetfilterOptions{
		Program: p, ProtocolFamily: h.family, Hook: h.hook, Priority: at.Priority,
	})
	if errors.Is(err, unix.EBUSY) || errors.Is(err, unix.EEXIST) {
		return nil
	}
	if err != nil {
		return err
	}
	return errors.Join(fmt.Errorf("%w: it is detached", ErrDiffers), l.Close())
}

// servicesAttached is nil when after_nat is where the mode says it is.
func (s *State) servicesAttached() error {
	mode, err := s.ServicesMode()
	if err != nil || mode != ServicesAfter {
		return err
	}
	p, err := s.program(bpf.ServiceProgAfterNat)
	if err != nil {
		return err
	}
	var errs []error
	for _, h := range natHooks() {
		errs = append(errs, s.checkNAT(h, p))
	}
	return errors.Join(errs...)
}

// repairServices attaches after_nat again where somebody removed it. Where that
// cannot be, Services are judged before translation.
func (s *State) repairServices() ([]Repaired, error) {
	mode, err := s.ServicesMode()
	if err != nil || mode == ServicesNone {
		return nil, err
	}
	lost := s.servicesAttached()
	if err := s.judgeServices(); err != nil || lost == nil {
		return nil, err
	}
	return []Repaired{{What: lost.Error() + ": attached again"}}, nil
}

// judgeServices puts the best mode into force that can be: IPVS may come and
// go.
func (s *State) judgeServices() error {
	err := s.afterNAT()
	if err == nil {
		return s.setServicesMode(ServicesAfter)
	}
	if mode, _ := s.ServicesMode(); mode != ServicesBefore && !s.private {
		s.log.Warn("Services are judged before translation, by all of their backends", "because", err)
	}
	return s.setServicesMode(ServicesBefore)
}

// upgradeServices puts this binary's after_nat into the place of another one.
// A packet meets one of them, or both.
func (s *State) upgradeServices() (bool, error) {
	old, err := s.program(bpf.ServiceProgAfterNat)
	if errors.Is(err, ErrNotInstalled) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	p, err := s.verifyAfterNAT()
	if err != nil {
		return false, err
	}
	defer func() { _ = p.Close() }()
	if same, err := sameProgram(old, p); same || err != nil {
		return false, err
	}
	if err := s.repin(bpf.ServiceProgAfterNat, func(path string) error { return p.Pin(path) }); err != nil {
		return false, err
	}
	_ = old.Close()
	delete(s.programs, bpf.ServiceProgAfterNat)
	if mode, err := s.ServicesMode(); err != nil || mode != ServicesAfter {
		return true, err
	}
	_, err = s.attachAfterNAT(p)
	return true, err
}
