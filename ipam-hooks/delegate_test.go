// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package ipamhooks

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"testing"

	"github.com/containernetworking/cni/pkg/types"
)

// journal plays the IPAM plugin and the register, and writes down who is called
// in which order.
type journal struct {
	entries []string
	stdin   []byte
	fail    map[string]error
}

func (j *journal) note(entry string) error {
	j.entries = append(j.entries, entry)
	return j.fail[entry]
}

func (j *journal) exec(_ context.Context, plugin, verb string, stdin []byte) ([]byte, error) {
	j.stdin = stdin
	return []byte(`{"ips": [{"address": "10.0.0.2/24"}, {"address": "fd00::2/64"}]}`), j.note(verb + " " + plugin)
}

func (j *journal) Claim(_ context.Context, a []netip.Addr) error {
	return j.note(fmt.Sprint("claim ", a))
}
func (j *journal) Release(context.Context) error { return j.note("release") }

func (j *journal) delegate(t *testing.T) *Delegate {
	t.Helper()
	stdin := []byte(`{"cniVersion": "1.1.0", "name": "net", "type": "bridge", "runtimeConfig": {"ips": ["10.0.0.2/24"]},
		"ipam": {"type": "podgate-ipam", "delegate": {"type": "host-local", "a": [1]}}}`)
	d, err := NewDelegate("host-local", "1.1.0", stdin, json.RawMessage(`{"type": "host-local", "a": [1]}`), j.exec)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestDelegate(t *testing.T) {
	const claim = "claim [10.0.0.2 fd00::2]"
	full, busy := errors.New("full"), &types.Error{Code: types.ErrTryAgainLater, Msg: "busy"}
	verbs := map[string]func(*Delegate, *journal) error{
		"ADD": func(d *Delegate, j *journal) error {
			r, err := d.Add(context.Background(), j)
			if (r == nil) != (err != nil) {
				return fmt.Errorf("result %v with error %w", r, err)
			}
			return err
		},
		"DEL":    func(d *Delegate, j *journal) error { return d.Del(context.Background(), j) },
		"CHECK":  func(d *Delegate, _ *journal) error { return d.Check(context.Background()) },
		"GC":     func(d *Delegate, _ *journal) error { return d.GC(context.Background()) },
		"STATUS": func(d *Delegate, _ *journal) error { return d.Status(context.Background()) },
	}
	for name, test := range map[string]struct {
		verb string
		fail map[string]error
		want []string
		err  error
	}{
		"address claimed at allocation":            {verb: "ADD", want: []string{"ADD host-local", claim}},
		"no address, nothing to claim":             {"ADD", map[string]error{"ADD host-local": busy}, []string{"ADD host-local"}, busy},
		"allocation undone when the claim fails":   {"ADD", map[string]error{claim: full}, []string{"ADD host-local", claim, "release", "DEL host-local"}, full},
		"address scrubbed before it is free":       {verb: "DEL", want: []string{"release", "DEL host-local"}},
		"address kept until it can be scrubbed":    {"DEL", map[string]error{"release": full}, []string{"release"}, full},
		"an error of the plugin goes to the top":   {"DEL", map[string]error{"DEL host-local": busy}, []string{"release", "DEL host-local"}, busy},
		"CHECK is forwarded":                       {"CHECK", map[string]error{"CHECK host-local": busy}, []string{"CHECK host-local"}, busy},
		"GC is forwarded":                          {"GC", map[string]error{"GC host-local": busy}, []string{"GC host-local"}, busy},
		"STATUS is forwarded":                      {"STATUS", map[string]error{"STATUS host-local": busy}, []string{"STATUS host-local"}, busy},
		"nothing but the answer of the plugin: OK": {verb: "STATUS", want: []string{"STATUS host-local"}},
	} {
		t.Run(name, func(t *testing.T) {
			j := &journal{fail: test.fail}
			err := verbs[test.verb](j.delegate(t), j)
			if !errors.Is(err, test.err) {
				t.Errorf("got error %v, want %v", err, test.err)
			}
			if !slices.Equal(j.entries, test.want) {
				t.Errorf("called %q, want %q", j.entries, test.want)
			}
		})
	}
}

func TestDelegateConfiguration(t *testing.T) {
	j := &journal{}
	if err := j.delegate(t).Check(t.Context()); err != nil {
		t.Fatal(err)
	}
	var got map[string]any
	if err := json.Unmarshal(j.stdin, &got); err != nil {
		t.Fatal(err)
	}
	want := map[string]any{
		"cniVersion": "1.1.0", "name": "net", "type": "bridge",
		"runtimeConfig": map[string]any{"ips": []any{"10.0.0.2/24"}},
		"ipam":          map[string]any{"type": "host-local", "a": []any{1.0}},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("plugin got %v, want %v", got, want)
	}
	if _, err := NewDelegate("x", "1.1.0", []byte("[]"), nil, nil); err == nil {
		t.Error("configuration that is no object was taken")
	}
}
