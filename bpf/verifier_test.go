// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package bpf

import (
	"fmt"
	"os"
	"strconv"
	"strings"
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

// stackLimit is MAX_BPF_STACK (linux/filter.h), of a function and all that it
// is called by.
const stackLimit = 512

// TestStackFits finds what kernels up to 6.8 reject and later ones may not:
// those round the stack of a function up to 32 bytes, these to 16.
func TestStackFits(t *testing.T) {
	spec, err := LoadDatapath()
	if err != nil {
		t.Fatal(err)
	}
	for name, p := range spec.Programs {
		bytes, chain := deepest(p.Instructions)
		t.Logf("%s: %d bytes: %s", name, bytes, strings.Join(chain, ", "))
		if bytes > stackLimit {
			t.Errorf("%s: %d bytes of stack, over %d: %s", name, bytes, stackLimit, strings.Join(chain, ", "))
		}
	}
}

func TestDeepest(t *testing.T) {
	insns := asm.Instructions{
		asm.StoreMem(asm.R10, -40, asm.R1, asm.DWord).WithSymbol("main"), // 64
		asm.Call.Label("a"),
		asm.Call.Label("b"),
		asm.Return(),
		asm.Mov.Reg(asm.R1, asm.R10).WithSymbol("a"), // 96
		asm.Add.Imm(asm.R1, -70),
		asm.Return(),
		asm.LoadMem(asm.R0, asm.R10, -8, asm.DWord).WithSymbol("b"), // 32
		asm.Call.Label("c"),
		asm.Return(),
		asm.Mov.Imm(asm.R0, 0).WithSymbol("c"), // 32
		asm.Call.Label("a"),
		asm.Return(),
	}
	bytes, chain := deepest(insns)
	if got, want := strings.Join(chain, ", "), "main 64, b 32, c 32, a 96"; bytes != 224 || got != want {
		t.Errorf("%d bytes: %s, not 224: %s", bytes, got, want)
	}
}

// deepest sums up the stack along the worst chain of calls, as
// check_max_stack_depth in kernel/bpf/verifier.c does.
func deepest(insns asm.Instructions) (bytes int, chain []string) {
	const round = 32
	own, calls := map[string]int{}, map[string][]string{}
	function := insns[0].Symbol()
	deep := func(offset int64) { own[function] = max(own[function], int(-offset)) }
	for i, in := range insns {
		if name := in.Symbol(); name != "" {
			function = name
			own[function] = max(own[function], 1)
		}
		switch class := in.OpCode.Class(); {
		case in.IsFunctionCall():
			calls[function] = append(calls[function], in.Reference())
		case class.IsStore() && in.Dst == asm.R10, class.IsLoad() && in.Src == asm.R10:
			deep(int64(in.Offset))
		case in.OpCode.ALUOp() == asm.Add && i > 0 && insns[i-1].OpCode.ALUOp() == asm.Mov && insns[i-1].Src == asm.R10 && in.Dst == insns[i-1].Dst:
			deep(in.Constant)
		}
	}
	var down func(name string) (int, []string)
	down = func(name string) (bytes int, chain []string) {
		for _, callee := range calls[name] {
			if n, c := down(callee); n > bytes {
				bytes, chain = n, c
			}
		}
		n := (own[name] + round - 1) / round * round
		return bytes + n, append([]string{fmt.Sprintf("%s %d", name, n)}, chain...)
	}
	return down(insns[0].Symbol())
}
