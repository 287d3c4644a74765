// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package pinning

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/podgate/podgate/pinning/rtnl"
)

// filterHandle marks the tc filters that are podgate's: "pg" and 1.
const filterHandle = 0x70670001

// filterPriority is the first there is: other programs come after ours.
const filterPriority = 1

// hooks by direction: ingress to the pod leaves the host end, egress from the
// pod comes in through it.
func hooks() [2]struct {
	parent uint32
	tcx    ebpf.AttachType
} {
	type hook = struct {
		parent uint32
		tcx    ebpf.AttachType
	}
	return [2]hook{
		{netlink.HANDLE_MIN_EGRESS, ebpf.AttachTCXEgress},
		{netlink.HANDLE_MIN_INGRESS, ebpf.AttachTCXIngress},
	}
}

// attach puts both programs on the host end. With [AttachAuto] it takes clsact
// unless an ingress qdisc is in its place: clsact attaches in a third of a
// millisecond, tcx links wait out two RCU grace periods, some 25 ms.
func (s *State) attach(endpoint uint32, ifindex int, kind AttachKind) (AttachKind, error) {
	if kind == AttachTCX {
		return AttachTCX, s.attachTCX(endpoint, ifindex)
	}
	err := s.attachClsact(ifindex)
	if err == nil || kind == AttachClsact {
		return AttachClsact, err
	}
	if !errors.Is(err, ErrNoHook) {
		return AttachAuto, err
	}
	if tcxErr := s.attachTCX(endpoint, ifindex); tcxErr != nil {
		return AttachAuto, fmt.Errorf("%w; and %w", err, tcxErr)
	}
	return AttachTCX, nil
}

// filterRequest changes our filter at a hook. A filter that is deleted needs no
// program.
func filterRequest(command, flags int, f filter) *nl.NetlinkRequest {
	r := nl.NewNetlinkRequest(command, flags)
	r.AddData(&nl.TcMsg{
		Family: unix.AF_UNSPEC, Ifindex: int32(f.ifindex), Handle: f.handle, Parent: hooks()[f.direction].parent,
		Info: netlink.MakeHandle(filterPriority, nl.Swap16(unix.ETH_P_ALL)),
	})
	r.AddData(nl.NewRtAttr(nl.TCA_KIND, nl.ZeroTerminated("bpf")))
	if f.program == nil {
		return r
	}
	options := nl.NewRtAttr(nl.TCA_OPTIONS, nil)
	options.AddRtAttr(nl.TCA_BPF_FD, nl.Uint32Attr(uint32(f.program.FD())))
	options.AddRtAttr(nl.TCA_BPF_NAME, nl.ZeroTerminated("podgate_"+programNames()[f.direction]))
	options.AddRtAttr(nl.TCA_BPF_FLAGS, nl.Uint32Attr(nl.TCA_BPF_FLAG_ACT_DIRECT))
	r.AddData(options)
	return r
}

// filter is one of ours.
type filter struct {
	ifindex, direction int
	handle             uint32
	program            *ebpf.Program
}

func (f filter) String() string {
	return fmt.Sprintf("%s at interface %d", programNames()[f.direction], f.ifindex)
}

// filters are both of ours on an interface.
func (s *State) filters(ifindex int) ([2]filter, error) {
	var both [2]filter
	for direction, name := range programNames() {
		p, err := s.program(name)
		if err != nil {
			return both, err
		}
		both[direction] = filter{ifindex, direction, filterHandle, p}
	}
	return both, nil
}

func (s *State) attachClsact(ifindex int) error {
	if err := addClsact(ifindex); err != nil {
		return err
	}
	return s.replaceFilters(ifindex)
}

func addClsact(ifindex int) error {
	r := nl.NewNetlinkRequest(unix.RTM_NEWQDISC, unix.NLM_F_CREATE|unix.NLM_F_EXCL)
	r.AddData(&nl.TcMsg{
		Family: unix.AF_UNSPEC, Ifindex: int32(ifindex),
		Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT,
	})
	r.AddData(nl.NewRtAttr(nl.TCA_KIND, nl.ZeroTerminated("clsact")))
	errs, err := request(r)
	if err == nil {
		err = errs[0]
	}
	switch {
	case errors.Is(err, unix.EEXIST):
		return hasClsact(ifindex)
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOENT):
		return fmt.Errorf("%w: the kernel has no clsact: %w", ErrNoHook, err)
	case err != nil:
		return fmt.Errorf("add clsact to interface %d: %w", ifindex, err)
	}
	return nil
}

// request has the kernel carry out changes in the network namespace of the
// calling thread and returns the error of each.
func request(changes ...*nl.NetlinkRequest) ([]error, error) {
	socket, err := rtnl.Open()
	if err != nil {
		return nil, err
	}
	answers, err := socket.Do(changes...)
	if err = errors.Join(err, socket.Close()); err != nil {
		return nil, err
	}
	errs := make([]error, len(answers))
	for i, a := range answers {
		errs[i] = a.Err
	}
	return errs, nil
}

// replaceFilters adds our filters or swaps the programs of those that are
// there, without a gap between old and new.
func (s *State) replaceFilters(ifindex int) error {
	both, err := s.filters(ifindex)
	if err != nil {
		return err
	}
	return changeFilters("attach", unix.RTM_NEWTFILTER, unix.NLM_F_CREATE, both[:]...)
}

// changeFilters makes a change to each filter, whatever becomes of the others.
func changeFilters(what string, command, flags int, filters ...filter) error {
	changes := make([]*nl.NetlinkRequest, len(filters))
	for i, f := range filters {
		changes[i] = filterRequest(command, flags, f)
	}
	errs, err := request(changes...)
	if err != nil {
		return fmt.Errorf("%s %s: %w", what, filters[0], err)
	}
	for i, err := range errs {
		if command == unix.RTM_DELTFILTER && isGone(err) {
			errs[i] = nil
		} else if err != nil {
			errs[i] = fmt.Errorf("%s %s: %w", what, filters[i], err)
		}
	}
	return errors.Join(errs...)
}

// leadFilters puts our filters in front of others of the same priority. The
// kernel runs the one that was added last first and leaves a replaced one in
// its place, so that ours are added anew, behind stand-ins that keep the hook
// meanwhile. Ours come first too: one that died here has left a stand-in alone.
func (s *State) leadFilters(ifindex int) error {
	both, err := s.filters(ifindex)
	if err != nil {
		return err
	}
	for _, ours := range both {
		standIn := ours
		standIn.handle++
		for _, step := range []func() error{
			func() error { return changeFilters("attach", unix.RTM_NEWTFILTER, unix.NLM_F_CREATE, ours) },
			func() error { return deleteFilters(standIn) },
			func() error { return addFilter(standIn) },
			func() error { return deleteFilters(ours) },
			func() error { return addFilter(ours) },
			func() error { return deleteFilters(standIn) },
		} {
			if err := step(); err != nil {
				return err
			}
		}
	}
	return nil
}

func addFilter(f filter) error {
	return changeFilters("attach", unix.RTM_NEWTFILTER, unix.NLM_F_CREATE|unix.NLM_F_EXCL, f)
}

// deleteFilters removes those that are there.
func deleteFilters(filters ...filter) error {
	return changeFilters("detach", unix.RTM_DELTFILTER, 0, filters...)
}

func detachClsact(ifindex int) error {
	return deleteFilters(filter{ifindex, 0, filterHandle, nil}, filter{ifindex, 1, filterHandle, nil})
}

// hasClsact tells a clsact qdisc from a plain ingress one, which has the same
// handle and no egress hook.
func hasClsact(ifindex int) error {
	qdiscs, err := netlink.QdiscList(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: ifindex}})
	if err != nil {
		return fmt.Errorf("list qdiscs of interface %d: %w", ifindex, err)
	}
	for _, q := range qdiscs {
		if q.Attrs().Parent == netlink.HANDLE_CLSACT && q.Type() == "clsact" {
			return nil
		}
	}
	return fmt.Errorf("%w: interface %d has an ingress qdisc, which excludes clsact", ErrNoHook, ifindex)
}

// isGone: the interface, its qdisc or the filter is not there.
func isGone(err error) bool {
	return errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINVAL)
}

func (s *State) attachTCX(endpoint uint32, ifindex int) error {
	if err := s.replaceTCX(endpoint, ifindex); err != nil {
		return errors.Join(err, s.detachTCX(endpoint))
	}
	return nil
}

func (s *State) attachTCXHook(endpoint uint32, ifindex, direction int, name string) error {
	p, err := s.program(name)
	if err != nil {
		return err
	}
	o := link.TCXOptions{Interface: ifindex, Program: p, Attach: hooks()[direction].tcx, Anchor: link.Head()}
	l, err := link.AttachTCX(o)
	for deadline := time.Now().Add(strayTime); errors.Is(err, unix.EEXIST) && time.Now().Before(deadline); l, err = link.AttachTCX(o) {
		if err := detachStray(o); err != nil {
			return fmt.Errorf("attach %s to interface %d: %w", name, ifindex, err)
		}
	}
	if errors.Is(err, ebpf.ErrNotSupported) {
		return fmt.Errorf("%w: the kernel has no tcx (it came with 6.6): %w", ErrNoHook, err)
	}
	if err != nil {
		return fmt.Errorf("attach %s to interface %d: %w", name, ifindex, err)
	}
	defer func() { _ = l.Close() }()
	path := s.layout.LinkPath(endpoint, name)
	if err := os.Mkdir(s.layout.endpointLinks(endpoint), 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("pin link: %w", err)
	}
	if err := l.Pin(path); err != nil {
		return fmt.Errorf("pin link %s: %w", path, err)
	}
	return nil
}

// strayTime bounds the wait for the kernel to detach links without references.
const strayTime = time.Second

// detachStray detaches links of the program that have lost their pins. One that
// has no references either is gone some milliseconds later: the kernel leaves
// that to a worker.
func detachStray(o link.TCXOptions) error {
	info, err := o.Program.Info()
	if err != nil {
		return fmt.Errorf("info: %w", err)
	}
	id, _ := info.ID()
	attached, err := link.QueryPrograms(link.QueryOptions{Target: o.Interface, Attach: o.Attach})
	if err != nil {
		return fmt.Errorf("list links: %w", err)
	}
	for _, a := range attached.Programs {
		linkID, ok := a.LinkID()
		if !ok || a.ID != id {
			continue
		}
		l, err := link.NewFromID(linkID)
		if errors.Is(err, fs.ErrNotExist) {
			time.Sleep(time.Millisecond)
			continue
		}
		if err != nil {
			return fmt.Errorf("open link: %w", err)
		}
		if err := errors.Join(l.Detach(), l.Close()); err != nil {
			return fmt.Errorf("detach link: %w", err)
		}
	}
	return nil
}

// detachTCX removes the pins, and with them the last reference to the links.
func (s *State) detachTCX(endpoint uint32) error {
	dir := s.layout.endpointLinks(endpoint)
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("unpin links %s: %w", dir, err)
	}
	return nil
}

// attached tells which of the hooks of an endpoint do not run our programs.
func (s *State) attached(e Endpoint) error {
	switch e.Attach {
	case AttachFormer:
		return nil
	case AttachTCX:
		return s.attachedTCX(e)
	default:
	}
	l := &netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: e.HostIfindex}}
	for direction, name := range programNames() {
		p, err := s.program(name)
		if err != nil {
			return err
		}
		info, err := p.Info()
		if err != nil {
			return fmt.Errorf("program %s: %w", name, err)
		}
		id, _ := info.ID()
		filters, err := netlink.FilterList(l, hooks()[direction].parent)
		if err != nil {
			return fmt.Errorf("list filters of interface %d: %w", e.HostIfindex, err)
		}
		if err := findFilter(filters, int(id)); err != nil {
			return fmt.Errorf("%s on interface %d: %w", name, e.HostIfindex, err)
		}
	}
	return nil
}

func findFilter(filters []netlink.Filter, id int) error {
	for i, f := range filters {
		b, ok := f.(*netlink.BpfFilter)
		if !ok || b.Handle != filterHandle || b.Priority != filterPriority {
			continue
		}
		if b.Id != id {
			return fmt.Errorf("%w: our filter runs program %d, not %d", ErrDiffers, b.Id, id)
		}
		if i > 0 {
			return fmt.Errorf("%w: another filter runs before ours", ErrDiffers)
		}
		return nil
	}
	return fmt.Errorf("%w: our filter is gone", ErrDiffers)
}

func (s *State) attachedTCX(e Endpoint) error {
	for _, name := range programNames() {
		p, err := s.program(name)
		if err != nil {
			return err
		}
		path := s.layout.LinkPath(e.ID, name)
		l, err := link.LoadPinnedLink(path, nil)
		if errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("%w: link %s is gone", ErrDiffers, path)
		}
		if err != nil {
			return fmt.Errorf("link %s: %w", path, err)
		}
		err = linkRuns(l, p, e.HostIfindex)
		if err = errors.Join(err, l.Close()); err != nil {
			return fmt.Errorf("link %s: %w", path, err)
		}
	}
	return nil
}

func linkRuns(l link.Link, p *ebpf.Program, ifindex int) error {
	info, err := l.Info()
	if err != nil {
		return fmt.Errorf("info: %w", err)
	}
	pinfo, err := p.Info()
	if err != nil {
		return fmt.Errorf("info: %w", err)
	}
	id, _ := pinfo.ID()
	tcx := info.TCX()
	if tcx == nil || int(tcx.Ifindex) != ifindex {
		return fmt.Errorf("%w: it is not on interface %d any more", ErrDiffers, ifindex)
	}
	if info.Program != id {
		return fmt.Errorf("%w: it runs program %d, not %d", ErrDiffers, info.Program, id)
	}
	return nil
}
