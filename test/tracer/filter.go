// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package tracer

import (
	"bytes"
	"fmt"
	"os"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// changes are the system calls with which Go changes something, with the
// argument that has the path; 0 where there is none. Programs in C have others
// beside them on some machines, such as mkdir(2). What is done to a file between
// opening and renaming it, but for writing to it, is not worth a stop.
var changes = map[uint32]struct {
	name string
	path int
}{
	unix.SYS_OPENAT:    {"openat", 1},
	unix.SYS_MKDIRAT:   {"mkdirat", 1},
	unix.SYS_UNLINKAT:  {"unlinkat", 1},
	unix.SYS_SYMLINKAT: {"symlinkat", 2},
	unix.SYS_LINKAT:    {"linkat", 3},
	unix.SYS_RENAMEAT:  {"renameat", 3},
	unix.SYS_RENAMEAT2: {"renameat2", 3},
	unix.SYS_FCHMODAT:  {"fchmodat", 1},
	unix.SYS_PWRITE64:  {"pwrite64", 0},
	unix.SYS_MOUNT:     {"mount", 1},
	unix.SYS_UMOUNT2:   {"umount2", 0},
	unix.SYS_BPF:       {"bpf", 0},
}

// writing are the flags of openat(2) without which it changes nothing.
const writing = unix.O_CREAT | unix.O_TRUNC | unix.O_WRONLY | unix.O_RDWR

// commands are those of bpf(2) that change what outlives the process.
var commands = map[uint32]string{
	unix.BPF_OBJ_PIN:         "OBJ_PIN",
	unix.BPF_MAP_UPDATE_ELEM: "MAP_UPDATE_ELEM",
	unix.BPF_MAP_DELETE_ELEM: "MAP_DELETE_ELEM",
	unix.BPF_PROG_ATTACH:     "PROG_ATTACH",
	unix.BPF_PROG_DETACH:     "PROG_DETACH",
	unix.BPF_LINK_CREATE:     "LINK_CREATE",
	unix.BPF_LINK_UPDATE:     "LINK_UPDATE",
	unix.BPF_LINK_DETACH:     "LINK_DETACH",
}

// userNotif is SECCOMP_RET_USER_NOTIF.
const userNotif = 0x7fc00000

// arg is where struct seccomp_data has the lower half of an argument.
func arg(n uint32) uint32 { return 16 + 8*n }

// filter asks the tracer about changes, and allows all else.
func filter() ([]unix.SockFilter, error) {
	ask, allow := bpf.RetConstant{Val: userNotif}, bpf.RetConstant{Val: unix.SECCOMP_RET_ALLOW}
	of := func(nr uint32, then ...bpf.Instruction) []bpf.Instruction {
		return append([]bpf.Instruction{bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: nr, SkipTrue: uint8(len(then))}}, then...)
	}
	program := []bpf.Instruction{bpf.LoadAbsolute{Off: 0, Size: 4}} // seccomp_data.nr
	for nr := range changes {
		switch nr {
		case unix.SYS_OPENAT:
			program = append(program, of(nr, bpf.LoadAbsolute{Off: arg(2), Size: 4},
				bpf.JumpIf{Cond: bpf.JumpBitsNotSet, Val: writing, SkipTrue: 1}, ask, allow)...)
		case unix.SYS_BPF:
			known := []bpf.Instruction{bpf.LoadAbsolute{Off: arg(0), Size: 4}}
			for command := range commands {
				known = append(known, of(command, ask)...)
			}
			program = append(program, of(nr, append(known, allow)...)...)
		default:
			program = append(program, of(nr, ask)...)
		}
	}
	raw, err := bpf.Assemble(append(program, allow))
	if err != nil {
		return nil, fmt.Errorf("filter: %w", err)
	}
	code := make([]unix.SockFilter, len(raw))
	for i, r := range raw {
		code[i] = unix.SockFilter{Code: r.Op, Jt: r.Jt, Jf: r.Jf, K: r.K}
	}
	return code, nil
}

// call in words.
func (n notification) call() Call {
	change := changes[uint32(n.nr)]
	c := Call{Name: change.name}
	if n.nr == unix.SYS_BPF {
		c.Name += " " + commands[uint32(n.args[0])]
	}
	if change.path > 0 {
		c.Path = text(n.pid, n.args[change.path])
	}
	return c
}

// text is a string in a process that waits.
func text(pid uint32, at uint64) string {
	memory, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		return ""
	}
	defer memory.Close()
	b := make([]byte, unix.PathMax)
	n, _ := memory.ReadAt(b, int64(at)) // Less, where its memory ends.
	b, _, _ = bytes.Cut(b[:n], []byte{0})
	return string(b)
}
