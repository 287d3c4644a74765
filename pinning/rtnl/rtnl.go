// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

// Package rtnl speaks rtnetlink (RFC 3549, rtnetlink(7)) for processes that
// last milliseconds: several requests in one datagram, over a socket that the
// Go runtime does not poll. What it sends is built with package nl of
// vishvananda/netlink. That package's own sockets are opened for each request
// or kept with the poller, which wakes a thread for each answer.
package rtnl

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"syscall"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// ErrMalformed means that a message of the kernel is shorter than it says.
var ErrMalformed = errors.New("malformed netlink message")

// answerSize is that of the largest message: the kernel fills buffers of up to
// 32 KiB when it dumps.
const answerSize = 32 << 10

// Socket is a connection to the kernel for one goroutine at a time. It stays
// with the network namespace it was opened in.
type Socket struct {
	fd  int
	seq uint32
	buf []byte
}

// Open makes a socket in the network namespace of the calling thread.
func Open() (*Socket, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("netlink socket: %w", err)
	}
	return &Socket{fd: fd}, nil
}

// OpenAt makes a socket in another network namespace. home is the one that the
// calling thread is in.
func OpenAt(other, home netns.NsHandle) (*Socket, error) {
	runtime.LockOSThread()
	if err := netns.Set(other); err != nil {
		runtime.UnlockOSThread()
		return nil, fmt.Errorf("enter network namespace: %w", err)
	}
	s, err := Open()
	if back := netns.Set(home); back != nil {
		// The thread stays locked: it is in the wrong place for anybody else.
		if s != nil {
			back = errors.Join(back, s.Close())
		}
		return nil, fmt.Errorf("leave network namespace: %w", back)
	}
	runtime.UnlockOSThread()
	return s, err
}

// Close releases the socket.
func (s *Socket) Close() error { return unix.Close(s.fd) }

// Strict lets the kernel filter dumps by what the request names
// (NETLINK_GET_STRICT_CHK, Linux 4.20).
func (s *Socket) Strict() error {
	if err := unix.SetsockoptInt(s.fd, unix.SOL_NETLINK, unix.NETLINK_GET_STRICT_CHK, 1); err != nil {
		return fmt.Errorf("strict netlink socket: %w", err)
	}
	return nil
}

// Answer to one request.
type Answer struct {
	// Messages without their headers.
	Messages [][]byte
	// Err is the kernel's [unix.Errno], or [nl.ErrDumpInterrupted]: what is
	// listed changed meanwhile, Messages have what was seen.
	Err error
}

// Do sends requests in one datagram and returns the answer to each. The kernel
// carries them out one after the other, also when one fails. Of several dumps
// at once it does only the first.
func (s *Socket) Do(requests ...*nl.NetlinkRequest) ([]Answer, error) {
	first := s.seq + 1
	var datagram []byte
	for _, r := range requests {
		s.seq++
		r.Seq = s.seq
		if r.Flags&unix.NLM_F_DUMP != unix.NLM_F_DUMP {
			r.Flags |= unix.NLM_F_ACK
		}
		datagram = append(datagram, r.Serialize()...)
	}
	if err := uninterrupted(func() error {
		return unix.Sendto(s.fd, datagram, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
	}); err != nil {
		return nil, fmt.Errorf("send to netlink: %w", err)
	}
	answers := make([]Answer, len(requests))
	for left := len(requests); left > 0; {
		messages, err := s.receive()
		if err != nil {
			return nil, fmt.Errorf("receive from netlink: %w", err)
		}
		for _, m := range messages {
			i := m.Header.Seq - first
			if i >= uint32(len(answers)) {
				continue
			}
			last, err := answers[i].take(m)
			if err != nil {
				return nil, err
			}
			if last {
				left--
			}
		}
	}
	return answers, nil
}

// receive does not wait: the kernel has answered when sending returns, and goes
// on with a dump as soon as there is room for it.
func (s *Socket) receive() ([]syscall.NetlinkMessage, error) {
	if s.buf == nil {
		s.buf = make([]byte, answerSize)
	}
	var n int
	var from unix.Sockaddr
	if err := uninterrupted(func() (err error) {
		n, from, err = unix.Recvfrom(s.fd, s.buf, unix.MSG_DONTWAIT|unix.MSG_TRUNC)
		return err
	}); err != nil {
		return nil, err
	}
	if n > len(s.buf) {
		return nil, fmt.Errorf("%w: %d bytes at once", ErrMalformed, n)
	}
	if kernel, ok := from.(*unix.SockaddrNetlink); !ok || kernel.Pid != 0 {
		return nil, nil
	}
	messages, err := syscall.ParseNetlinkMessage(append([]byte(nil), s.buf[:n]...))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	return messages, nil
}

func uninterrupted(call func() error) error {
	for {
		if err := call(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// take adds a message and reports whether it was the last.
func (a *Answer) take(m syscall.NetlinkMessage) (last bool, err error) {
	if m.Header.Flags&unix.NLM_F_DUMP_INTR != 0 {
		a.Err = nl.ErrDumpInterrupted
	}
	switch m.Header.Type {
	case unix.NLMSG_DONE, unix.NLMSG_ERROR:
	default:
		a.Messages = append(a.Messages, m.Data)
		return false, nil
	}
	if len(m.Data) < 4 {
		if m.Header.Type == unix.NLMSG_DONE {
			return true, nil
		}
		return true, fmt.Errorf("%w: acknowledgement of %d bytes", ErrMalformed, len(m.Data))
	}
	if errno := -int32(binary.NativeEndian.Uint32(m.Data)); errno != 0 {
		a.Err = unix.Errno(errno)
	}
	return true, nil
}

// Link asks for an interface (RTM_GETLINK) by its number, or by its name if
// index is zero. The answer is for netlink.LinkDeserialize.
func Link(index int, name string) *nl.NetlinkRequest {
	r := nl.NewNetlinkRequest(unix.RTM_GETLINK, 0)
	message := nl.NewIfInfomsg(unix.AF_UNSPEC)
	message.Index = int32(index)
	r.AddData(message)
	if index == 0 {
		r.AddData(nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(name)))
	}
	return r
}

// NetNSID asks for the number by which the socket's network namespace knows
// another one (RTM_GETNSID). The answer is for [ParseNetNSID].
func NetNSID(other netns.NsHandle) *nl.NetlinkRequest {
	r := nl.NewNetlinkRequest(unix.RTM_GETNSID, 0)
	r.AddData(nl.NewRtGenMsg())
	r.AddData(nl.NewRtAttr(netlink.NETNSA_FD, nl.Uint32Attr(uint32(other))))
	return r
}

// ParseNetNSID reads a struct rtgenmsg and its attributes. The number is -1 of
// a network namespace that has none. It returns [ErrMalformed].
func ParseNetNSID(message []byte) (int, error) {
	const header = 4
	if len(message) < header {
		return 0, fmt.Errorf("%w: namespace number in %d bytes", ErrMalformed, len(message))
	}
	attrs, err := nl.ParseRouteAttr(message[header:])
	if err != nil {
		return 0, fmt.Errorf("%w: namespace number: %w", ErrMalformed, err)
	}
	for _, attr := range attrs {
		if attr.Attr.Type == netlink.NETNSA_NSID && len(attr.Value) >= 4 {
			return int(int32(binary.NativeEndian.Uint32(attr.Value))), nil
		}
	}
	return 0, fmt.Errorf("%w: no namespace number", ErrMalformed)
}

// Addresses asks for all addresses (RTM_GETADDR); on a strict socket for those
// of an interface only unless index is zero. The answer is for [ParseAddress].
func Addresses(index int) *nl.NetlinkRequest {
	r := nl.NewNetlinkRequest(unix.RTM_GETADDR, unix.NLM_F_DUMP)
	message := nl.NewIfAddrmsg(unix.AF_UNSPEC)
	message.Index = uint32(index)
	r.AddData(message)
	return r
}

// Address of an interface.
type Address struct {
	netip.Addr
	Ifindex int
}

// ParseAddress reads a struct ifaddrmsg (linux/if_addr.h) and its attributes.
// Addr is not valid if the message has none. It returns [ErrMalformed].
func ParseAddress(message []byte) (Address, error) {
	if len(message) < unix.SizeofIfAddrmsg {
		return Address{}, fmt.Errorf("%w: address in %d bytes", ErrMalformed, len(message))
	}
	a := Address{Ifindex: int(binary.NativeEndian.Uint32(message[4:]))}
	attrs, err := nl.ParseRouteAttr(message[unix.SizeofIfAddrmsg:])
	if err != nil {
		return Address{}, fmt.Errorf("%w: address: %w", ErrMalformed, err)
	}
	for _, attr := range attrs {
		ip, ok := netip.AddrFromSlice(attr.Value)
		switch attr.Attr.Type {
		case unix.IFA_LOCAL:
			// Wins over IFA_ADDRESS, which is the peer's where they differ.
			if ok {
				a.Addr = ip.Unmap()
			}
		case unix.IFA_ADDRESS:
			if ok && !a.IsValid() {
				a.Addr = ip.Unmap()
			}
		}
	}
	return a, nil
}

// Route asks which way the kernel would send to an address (RTM_GETROUTE). The
// answer is for [IsLocal].
func Route(to netip.Addr) *nl.NetlinkRequest {
	r := nl.NewNetlinkRequest(unix.RTM_GETROUTE, 0)
	family := uint8(unix.AF_INET)
	if to.Is6() {
		family = unix.AF_INET6
	}
	r.AddData(&nl.RtMsg{RtMsg: unix.RtMsg{Family: family, Dst_len: uint8(to.BitLen())}})
	r.AddData(nl.NewRtAttr(unix.RTA_DST, to.AsSlice()))
	return r
}

// IsLocal reports whether a route (struct rtmsg, linux/rtnetlink.h) leads to
// this node itself.
func IsLocal(message []byte) bool {
	const typeOffset = 7
	return len(message) >= unix.SizeofRtMsg && message[typeOffset] == unix.RTN_LOCAL
}
