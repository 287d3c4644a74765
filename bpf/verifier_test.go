// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package bpf

import (
	"fmt"
	"os"
	"strconv"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/rlimit"
)

// verifierBudget is far below the kernel's limit of a million: loading takes
// time in proportion, and a function that stops being verified on its own
// shows as a jump past it.
const verifierBudget = 50_000

// TestVerifierBudget loads the programs as they are and reports how much work
// that is for this kernel's verifier.
func TestVerifierBudget(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("loading programs needs root")
	}
	if err := rlimit.RemoveMemlock(); err != nil {
		t.Fatal(err)
	}
	spec, err := LoadDatapath()
	if err != nil {
		t.Fatal(err)
	}
	coll, err := ebpf.NewCollection(spec)
	if err != nil {
		t.Fatalf("%+v", err)
	}
	defer coll.Close()
	for _, name := range []string{DatapathProgFromPod, DatapathProgToPod} {
		info, err := coll.Programs[name].Info()
		if err != nil {
			t.Fatal(err)
		}
		n, ok := info.VerifiedInstructions()
		if !ok {
			t.Attr("verified-"+name, "not told by this kernel") // before 5.16
			continue
		}
		t.Attr("verified-"+name, strconv.FormatUint(uint64(n), 10))
		if n > verifierBudget {
			t.Errorf("%s: the verifier looked at %d instructions, over %d", name, n, verifierBudget)
		}
	}
}

// TestLoopsEndInJumps finds what kernels up to 6.1 reject and later ones do
// not: a loop whose last instruction falls into its first.
func TestLoopsEndInJumps(t *testing.T) {
	spec, err := LoadDatapath()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{DatapathProgFromPod, DatapathProgToPod} {
		if err := fallsBack(spec.Programs[name].Instructions); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestFallsBack(t *testing.T) {
	loop := func(latch ...asm.Instruction) asm.Instructions {
		// Entered in its middle: the header is reached by the jump first.
		insns := asm.Instructions{
			asm.Mov.Imm(asm.R0, 0),
			asm.Instruction{OpCode: asm.OpCode(asm.JumpClass).SetJumpOp(asm.Ja), Offset: int16(len(latch))},
		}
		insns = append(insns, latch...)
		return append(insns,
			asm.Add.Imm(asm.R0, 1),
			asm.Instruction{OpCode: asm.JLT.Op(asm.ImmSource), Dst: asm.R0, Constant: 8, Offset: int16(-2 - len(latch))},
			asm.Return())
	}
	if err := fallsBack(loop(asm.Mov.Imm(asm.R1, 0))); err == nil {
		t.Error("a loop that falls into its first instruction is not found")
	}
	ja := asm.Instruction{OpCode: asm.OpCode(asm.JumpClass).SetJumpOp(asm.Ja)}
	if err := fallsBack(loop(asm.Mov.Imm(asm.R1, 0), ja)); err != nil {
		t.Errorf("a loop that ends in a jump: %v", err)
	}
}

// fallsBack walks the control flow of each function depth first, as check_cfg
// in kernel/bpf/verifier.c does, and returns an error for an edge that leads
// back to an instruction still being explored and is not that of a jump.
func fallsBack(insns asm.Instructions) error {
	type edge struct {
		to   int
		jump bool
	}
	index := map[asm.RawInstructionOffset]int{}
	var offsets []asm.RawInstructionOffset
	for it := insns.Iterate(); it.Next(); {
		index[it.Offset] = it.Index
		offsets = append(offsets, it.Offset)
	}
	edges := func(i int) []edge {
		in := &insns[i]
		switch in.OpCode.JumpOp() {
		case asm.Exit:
			return nil
		case asm.InvalidJumpOp, asm.Call:
			return []edge{{i + 1, false}}
		case asm.Ja:
			return []edge{{index[offsets[i]+1+asm.RawInstructionOffset(in.Offset)], true}}
		default:
			return []edge{{i + 1, true}, {index[offsets[i]+1+asm.RawInstructionOffset(in.Offset)], true}}
		}
	}
	const exploring, explored = 1, 2
	state := make([]int, len(insns))
	var visit func(i int) error
	visit = func(i int) error {
		state[i] = exploring
		for _, e := range edges(i) {
			switch {
			case state[e.to] == 0:
				if err := visit(e.to); err != nil {
					return err
				}
			case state[e.to] == exploring && !e.jump:
				return fmt.Errorf("instruction %d (%v) falls back into a loop", i, insns[i])
			}
		}
		state[i] = explored
		return nil
	}
	for i := range insns {
		if i == 0 || insns[i].Symbol() != "" {
			if err := visit(i); err != nil {
				return err
			}
		}
	}
	return nil
}
