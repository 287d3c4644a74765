// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package conf

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/bits"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// Mode of a gate until its policy is known.
type Mode string

// ModeClosed drops, ModeOpen allows.
const (
	ModeClosed Mode = "closed"
	ModeOpen   Mode = "open"
)

// UnmarshalJSON reads one of the modes.
func (m *Mode) UnmarshalJSON(b []byte) error { return oneOf(b, m, ModeClosed, ModeOpen) }

// Attach is a kind of kernel hook.
type Attach string

// AttachAuto takes clsact where no neighbour in the chain wants an ingress
// qdisc of its own on the veth, and tcx there.
const (
	AttachAuto   Attach = "auto"
	AttachClsact Attach = "clsact"
	AttachTCX    Attach = "tcx"
)

// UnmarshalJSON reads one of the kinds.
func (a *Attach) UnmarshalJSON(b []byte) error {
	return oneOf(b, a, AttachAuto, AttachClsact, AttachTCX)
}

// NonVeth is what to do with an interface that has no host-side veth.
type NonVeth string

// NonVethError fails ADD, NonVethSkip leaves the interface ungated.
const (
	NonVethError NonVeth = "error"
	NonVethSkip  NonVeth = "skip"
)

// UnmarshalJSON reads one of the choices.
func (n *NonVeth) UnmarshalJSON(b []byte) error { return oneOf(b, n, NonVethError, NonVethSkip) }

// level goes by the names that the reference plugins use.
type level slog.Level

func (l *level) UnmarshalJSON(b []byte) error {
	var name string
	if err := oneOf(b, &name, "debug", "info", "warn", "error"); err != nil {
		return err
	}
	return (*slog.Level)(l).UnmarshalText([]byte(name))
}

// oneOf reads a JSON string that must be one of choices.
func oneOf[T ~string](b []byte, target *T, choices ...T) error {
	var s string
	if err := json.Unmarshal(b, &s); err != nil {
		return err
	}
	if !slices.Contains(choices, T(s)) {
		names := make([]string, len(choices))
		for i, c := range choices {
			names[i] = string(c)
		}
		return fmt.Errorf("%q is not one of %s", s, strings.Join(names, ", "))
	}
	*target = T(s)
	return nil
}

// Duration in Go's notation: "1.5s", "300ms".
type Duration time.Duration

// UnmarshalJSON reads a duration from 0 to [MaxWait].
func (d *Duration) UnmarshalJSON(b []byte) error {
	var s string
	if err := json.Unmarshal(b, &s); err != nil {
		return err
	}
	v, err := time.ParseDuration(s)
	if err != nil {
		return fmt.Errorf("%q is not a duration like 300ms or 2s", s)
	}
	if v < 0 || v > MaxWait {
		return fmt.Errorf("%q is not between 0s and %s", s, MaxWait)
	}
	*d = Duration(v)
	return nil
}

// absolutePath is cleaned.
type absolutePath string

func (p *absolutePath) UnmarshalJSON(b []byte) error {
	var s string
	if err := json.Unmarshal(b, &s); err != nil {
		return err
	}
	if !filepath.IsAbs(s) || strings.ContainsRune(s, 0) {
		return fmt.Errorf("%q is not an absolute path", s)
	}
	*p = absolutePath(filepath.Clean(s))
	return nil
}

// pinName is a directory of a bpffs, which does not take dots.
type pinName string

func (n *pinName) UnmarshalJSON(b []byte) error {
	var s string
	if err := json.Unmarshal(b, &s); err != nil {
		return err
	}
	const letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-"
	if s == "" || len(s) > 64 || strings.Trim(s, letters) != "" {
		return fmt.Errorf("%q is not a name of 1 to 64 letters, digits, _ and -", s)
	}
	*n = pinName(s)
	return nil
}

// ringSize is what the kernel takes for a ring buffer with the smallest page
// size there is; 0 is the default.
type ringSize uint32

func (r *ringSize) UnmarshalJSON(b []byte) error {
	var n uint32
	if err := json.Unmarshal(b, &n); err != nil {
		return err
	}
	if n != 0 && (n < 4096 || bits.OnesCount32(n) != 1) {
		return fmt.Errorf("%d is not a power of two of at least 4096", n)
	}
	*r = ringSize(n)
	return nil
}

// UnmarshalJSON picks what podgate needs of the capability arguments.
func (r *Runtime) UnmarshalJSON(b []byte) error {
	var v struct {
		MAC       string          `json:"mac"`
		Bandwidth json.RawMessage `json:"bandwidth"`
	}
	if err := json.Unmarshal(b, &v); err != nil {
		return err
	}
	if v.MAC != "" {
		mac, err := net.ParseMAC(v.MAC)
		if err != nil || len(mac) != 6 {
			return fmt.Errorf("mac: %q is not an Ethernet address", v.MAC)
		}
		r.MAC = mac
	}
	r.Bandwidth = v.Bandwidth != nil && string(v.Bandwidth) != "null"
	return nil
}

// UnmarshalJSON takes null for an empty list: libcni encodes an empty list of a
// GC call so.
func (a *Attachments) UnmarshalJSON(b []byte) error {
	*a = Attachments{Given: true}
	return json.Unmarshal(b, &a.List)
}

// args is args.cni.labels of the CNI conventions.
type args map[string]string

func (a *args) UnmarshalJSON(b []byte) error {
	var v struct {
		CNI struct {
			Labels []struct {
				Key   string `json:"key"`
				Value string `json:"value"`
			} `json:"labels"`
		} `json:"cni"`
	}
	if err := json.Unmarshal(b, &v); err != nil {
		return err
	}
	for i, l := range v.CNI.Labels {
		if l.Key == "" {
			return fmt.Errorf("cni.labels[%d]: has no key", i)
		}
		(*a)[l.Key] = l.Value
	}
	return nil
}

// delegate is the delegate key of an ipam object.
type delegate IPAM

func (d *delegate) UnmarshalJSON(b []byte) error {
	var v struct {
		Type string `json:"type"`
	}
	if err := json.Unmarshal(b, &v); err != nil {
		return err
	}
	if v.Type == "" {
		return errors.New("has no type")
	}
	d.Delegate, d.DelegateType = slices.Clone(b), v.Type
	return nil
}
