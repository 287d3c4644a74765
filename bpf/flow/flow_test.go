// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package flow_test

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"net/netip"
	"testing"
	"time"
	"unsafe"

	"github.com/podgate/podgate/bpf"
	"github.com/podgate/podgate/bpf/flow"
	"github.com/podgate/podgate/bpf/policy"
)

// record is an event as the kernel writes it.
func record(t testing.TB, e bpf.DatapathEvent) []byte {
	t.Helper()
	b, err := binary.Append(nil, binary.NativeEndian, e)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func address(s string) bpf.DatapathAddress {
	return bpf.DatapathAddress{Bytes: netip.MustParseAddr(s).As16()}
}

func sample() bpf.DatapathEvent {
	return bpf.DatapathEvent{
		TimeNs: 5e9, Local: address("10.0.0.1"), Peer: address("fd00::2"), Endpoint: 7, Ifindex: 8, Rule: 9, Ruleset: 10,
		Class: 11, Length: 1500, LocalPort: 80, PeerPort: 40000, Ethertype: 0x86dd,
		Type: uint8(bpf.DatapathEventTypeEVENT_DROP), Direction: uint8(bpf.DatapathDirectionDIRECTION_EGRESS),
		Verdict: uint8(bpf.DatapathVerdictVERDICT_DENIED), Reason: uint8(bpf.DatapathReasonREASON_DEFAULT),
		Protocol: 6, TcpFlags: 2, IcmpType: 3, IcmpCode: 4,
	}
}

func TestDecode(t *testing.T) {
	clock, err := flow.NewClock()
	if err != nil {
		t.Fatal(err)
	}
	got, err := flow.Decode(record(t, sample()), clock)
	if err != nil {
		t.Fatal(err)
	}
	want := flow.Flow{
		Time: clock.At(5e9), Endpoint: 7, Ifindex: 8, Direction: policy.Egress, Verdict: flow.Denied,
		Reason: flow.Reason(bpf.DatapathReasonREASON_DEFAULT),
		Local:  netip.MustParseAddrPort("10.0.0.1:80"), Peer: netip.MustParseAddrPort("[fd00::2]:40000"),
		EtherType: 0x86dd, Protocol: policy.TCP, TCPFlags: 2, ICMPType: 3, ICMPCode: 4,
		Rule: 9, Class: 11, Ruleset: 10, Length: 1500,
	}
	if got != want {
		t.Errorf("decoded is\n%+v, not\n%+v", got, want)
	}
	// A later kernel side may add to the record.
	if longer, err := flow.Decode(append(record(t, sample()), 1, 2, 3), clock); err != nil || longer != want {
		t.Errorf("a longer record: %+v, %v", longer, err)
	}
}

func TestDecodeTruncated(t *testing.T) {
	whole := record(t, sample())
	for n := range len(whole) {
		if _, err := flow.Decode(whole[:n], flow.Clock{}); !errors.Is(err, flow.ErrTruncated) {
			t.Errorf("%d of %d bytes: %v", n, len(whole), err)
		}
	}
}

// The kernel's clock and the wall clock are a constant apart.
func TestClock(t *testing.T) {
	before := time.Now()
	clock, err := flow.NewClock()
	if err != nil {
		t.Fatal(err)
	}
	if boot := clock.At(0); boot.After(before) {
		t.Errorf("the kernel's clock started at %s, now is %s", boot, before)
	}
	if d := clock.At(3e9).Sub(clock.At(1e9)); d != 2*time.Second {
		t.Errorf("2 s of the kernel's are %s", d)
	}
}

// Every reason the datapath gives has a word and a sentence of its own.
func TestWords(t *testing.T) {
	words, sentences := map[string]flow.Reason{}, map[string]flow.Reason{}
	for r := range flow.Reason(bpf.DatapathReasonREASON_COUNT) {
		word, sentence := r.String(), r.Explain()
		if other, taken := words[word]; taken {
			t.Errorf("reasons %d and %d are both %q", other, r, word)
		}
		if other, taken := sentences[sentence]; taken {
			t.Errorf("reasons %d and %d are both %q", other, r, sentence)
		}
		if word == unknownReason(r) || sentence == word {
			t.Errorf("reason %d has no words: %q, %q", r, word, sentence)
		}
		words[word], sentences[sentence] = r, r
	}
	unknown := flow.Reason(bpf.DatapathReasonREASON_COUNT)
	if unknown.String() != unknownReason(unknown) || unknown.Explain() != unknownReason(unknown) {
		t.Errorf("an unknown reason is %q, %q", unknown, unknown.Explain())
	}
	for v, want := range map[flow.Verdict]string{flow.Denied: "denied", flow.Allowed: "allowed", flow.Audited: "audited", 9: "verdict-9"} {
		if v.String() != want {
			t.Errorf("verdict %d is %q", v, v)
		}
	}
	for s, want := range []string{"new", "established", "closing", "closed", "state-4"} {
		if got := flow.State(s).String(); got != want {
			t.Errorf("state %d is %q", s, got)
		}
	}
	b, err := json.Marshal(map[string]any{
		"verdict": flow.Denied, "reason": flow.Reason(bpf.DatapathReasonREASON_CLOSED), "state": flow.State(1),
	})
	if want := `{"reason":"closed","state":"established","verdict":"denied"}`; err != nil || string(b) != want {
		t.Errorf("as JSON %s, not %s, %v", b, want, err)
	}
}

func unknownReason(r flow.Reason) string {
	b, _ := json.Marshal(uint8(r))
	return "reason-" + string(b)
}

// FuzzDecode: any bytes are a flow or an error, and what is a flow says what
// the record says.
func FuzzDecode(f *testing.F) {
	f.Add(record(f, sample()))
	f.Add(record(f, bpf.DatapathEvent{}))
	f.Add(bytes.Repeat([]byte{0xff}, int(unsafe.Sizeof(bpf.DatapathEvent{}))))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := flow.Decode(b, flow.Clock{})
		size := int(unsafe.Sizeof(bpf.DatapathEvent{}))
		if (err != nil) != (len(b) < size) {
			t.Fatalf("%d bytes: %v", len(b), err)
		}
		if err != nil {
			return
		}
		var e bpf.DatapathEvent
		if _, err := binary.Decode(b, binary.NativeEndian, &e); err != nil {
			t.Fatal(err)
		}
		if got.Local.Addr().As16() != e.Local.Bytes || got.Peer.Addr().As16() != e.Peer.Bytes || got.Local.Port() != e.LocalPort ||
			got.Peer.Port() != e.PeerPort || got.Rule != e.Rule || got.Length != e.Length || uint8(got.Reason) != e.Reason {
			t.Errorf("%+v is decoded as %+v", e, got)
		}
		if got.Reason.String() == "" || got.Reason.Explain() == "" || got.Verdict.String() == "" {
			t.Errorf("%+v has no words", got)
		}
	})
}
