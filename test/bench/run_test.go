// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package bench

import (
	"errors"
	"fmt"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// Words of struct __sk_buff (linux/bpf.h).
const (
	skbIngressIfindex = 9
	skbIfindex        = 10
	skbWords          = 48
)

// arrival says where a frame is seen: at the hook of ifindex, after it came in
// through from, if it did.
type arrival struct{ ifindex, from int }

// testRun runs a program on a frame in the kernel's own loop and returns its
// answer to the last one and the time for each. [ebpf.Program.Benchmark] takes
// no context and [ebpf.Program.Run] does not tell the time.
func testRun(p *ebpf.Program, frame []byte, at arrival, repeat int) (int32, time.Duration, error) {
	context := make([]uint32, skbWords)
	context[skbIfindex], context[skbIngressIfindex] = uint32(at.ifindex), uint32(at.from)
	// The member test of union bpf_attr (linux/bpf.h).
	attr := struct {
		program, answer             uint32
		frameSize, frameSizeOut     uint32
		frame, frameOut             unsafe.Pointer
		repeat, nanoseconds         uint32
		contextSize, contextSizeOut uint32
		context, contextOut         unsafe.Pointer
		flags, cpu, batch, _        uint32
	}{
		program: uint32(p.FD()), repeat: uint32(repeat),
		frameSize: uint32(len(frame)), frame: unsafe.Pointer(&frame[0]),
		contextSize: skbWords * 4, context: unsafe.Pointer(&context[0]),
	}
	for {
		_, _, err := unix.Syscall(unix.SYS_BPF, unix.BPF_PROG_TEST_RUN, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
		// A signal, as the Go runtime sends them, ends the loop.
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != 0 {
			return 0, 0, fmt.Errorf("test run of %s: %w", p, err)
		}
		return int32(attr.answer), time.Duration(attr.nanoseconds), nil
	}
}
