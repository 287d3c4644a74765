// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package conf

import (
	"errors"
	"log/slog"
	"maps"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"
)

func TestParse(t *testing.T) {
	with := func(change func(*NetConf)) *NetConf {
		c := Defaults()
		change(c)
		return c
	}
	for name, test := range map[string]struct {
		json string
		want *NetConf
	}{
		"nothing": {`{}`, Defaults()},
		"list": {
			`{"cniVersion": "1.1.0", "name": "net", "type": "podgate-cni"}`,
			with(func(c *NetConf) { c.CNIVersion, c.Name = "1.1.0", "net" }),
		},
		"everything": {
			`{"mode": "open", "waitForPolicy": "1.5s", "attach": "tcx", "antiSpoof": false, "audit": true,
			  "nonVeth": "skip", "bpffs": "/run/bpf/", "instance": "a_B-9", "logLevel": "debug", "logFile": "/var/log/podgate.log",
			  "capacity": {"endpoints": 1, "flows": 2, "peers": 3, "blocks": 4, "cells": 5, "rules": 6, "services": 9, "fragments": 7, "eventBytes": 8192}}`,
			&NetConf{
				Labels: map[string]string{},
				Gate: Gate{
					Mode: ModeOpen, WaitForPolicy: Duration(1500 * time.Millisecond), Attach: AttachTCX, Audit: true, NonVeth: NonVethSkip,
				},
				Instance: Instance{
					BPFFS: "/run/bpf", Instance: "a_B-9",
					Capacity: Capacity{Endpoints: 1, Flows: 2, Peers: 3, Blocks: 4, Cells: 5, Rules: 6, Services: 9, Fragments: 7, EventBytes: 8192},
				},
				Log: Log{LogLevel: slog.LevelDebug, LogFile: "/var/log/podgate.log"},
			},
		},
		"keys of others": {
			`{"cniVersions": ["1.0.0"], "capabilities": {"mac": true}, "ipMasq": true, "ipam": {"type": "x", "mode": 7}, "dns": {},
			  "cni.dev/anything": 1, "runtimeConfig": {"portMappings": [], "ips": ["10.0.0.1"]}, "args": {"cni": {"ips": []}, "else": 1}}`,
			Defaults(),
		},
		"capabilities": {
			`{"runtimeConfig": {"mac": "02:00:00:00:00:01", "bandwidth": {"ingressRate": 1}}}`,
			with(func(c *NetConf) { c.Runtime = Runtime{MAC: []byte{2, 0, 0, 0, 0, 1}, Bandwidth: true} }),
		},
		"capabilities that are null": {`{"runtimeConfig": {"mac": "", "bandwidth": null}}`, Defaults()},
		"labels": {
			`{"args": {"cni": {"labels": [{"key": "app", "value": "web"}, {"key": "empty", "value": ""}]}}}`,
			with(func(c *NetConf) { c.Labels = map[string]string{"app": "web", "empty": ""} }),
		},
		"prevResult as it is": {
			`{"prevResult": {"cniVersion":  "9.9.9", "x": 1}}`,
			with(func(c *NetConf) { c.PrevResult = []byte(`{"cniVersion":  "9.9.9", "x": 1}`) }),
		},
		"no attachment valid": {
			`{"cni.dev/valid-attachments": []}`,
			with(func(c *NetConf) { c.Valid = Attachments{Given: true, List: []types.GCAttachment{}} }),
		},
		"no attachment valid, from a nil slice": {
			`{"cni.dev/valid-attachments": null}`,
			with(func(c *NetConf) { c.Valid = Attachments{Given: true} }),
		},
		"valid attachments": {
			`{"cni.dev/valid-attachments": [{"containerID": "c", "ifname": "eth0"}], "cni.dev/attachments": [{"containerID": "old"}]}`,
			with(func(c *NetConf) {
				c.Valid = Attachments{Given: true, List: []types.GCAttachment{{ContainerID: "c", IfName: "eth0"}}}
			}),
		},
		"valid attachments by the older name": {
			`{"cni.dev/attachments": [{"containerID": "c", "ifname": "eth0"}]}`,
			with(func(c *NetConf) {
				c.Valid = Attachments{Given: true, List: []types.GCAttachment{{ContainerID: "c", IfName: "eth0"}}}
			}),
		},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := Parse([]byte(test.json))
			if err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(got, test.want) {
				t.Errorf("got  %+v\nwant %+v", got, test.want)
			}
		})
	}
}

func TestParseFaults(t *testing.T) {
	for json, wants := range map[string][]string{
		`{"mode": "ajar"}`:                         {`mode: "ajar" is not one of closed, open`},
		`{"mode": null}`:                           {`mode: "" is not one of`},
		`{"mode": 1}`:                              {"mode: a JSON number does not fit"},
		`{"Mode": "open"}`:                         {"Mode: unknown key"},
		`{"moed": "open", "zzz": 1}`:               {"moed: unknown key", "zzz: unknown key"},
		`{"attach": "xdp"}`:                        {`attach: "xdp" is not one of auto, clsact, tcx`},
		`{"nonVeth": ""}`:                          {`nonVeth: "" is not one of error, skip`},
		`{"waitForPolicy": 5}`:                     {"waitForPolicy: a JSON number does not fit"},
		`{"waitForPolicy": "soon"}`:                {`waitForPolicy: "soon" is not a duration`},
		`{"waitForPolicy": "-1s"}`:                 {`waitForPolicy: "-1s" is not between 0s and 1m0s`},
		`{"waitForPolicy": "61s"}`:                 {`waitForPolicy: "61s" is not between`},
		`{"antiSpoof": "no"}`:                      {"antiSpoof: a JSON string does not fit"},
		`{"audit": 0}`:                             {"audit: a JSON number does not fit"},
		`{"bpffs": "sys/fs/bpf"}`:                  {`bpffs: "sys/fs/bpf" is not an absolute path`},
		`{"bpffs": "/a\u0000b"}`:                   {"bpffs:", "is not an absolute path"},
		`{"logFile": ""}`:                          {`logFile: "" is not an absolute path`},
		`{"instance": "a.b"}`:                      {`instance: "a.b" is not a name`},
		`{"instance": "../x"}`:                     {`instance: "../x" is not a name`},
		`{"instance": ""}`:                         {`instance: "" is not a name`},
		`{"logLevel": "loud"}`:                     {`logLevel: "loud" is not one of debug, info, warn, error`},
		`{"logLevel": "info+1"}`:                   {`logLevel: "info+1" is not one of`},
		`{"capacity": {"flow": 1}}`:                {"capacity: flow: unknown key"},
		`{"capacity": {"flows": -1}}`:              {"capacity: flows: a JSON number -1 does not fit"},
		`{"capacity": {"flows": 4294967296}}`:      {"flows: a JSON number 4294967296 does not fit"},
		`{"capacity": {"eventBytes": 5000}}`:       {"eventBytes: 5000 is not a power of two"},
		`{"capacity": {"eventBytes": 2048}}`:       {"eventBytes: 2048 is not a power of two of at least 4096"},
		`{"capacity": []}`:                         {"capacity: a JSON array does not fit"},
		`{"runtimeConfig": {"mac": "x"}}`:          {`runtimeConfig: mac: "x" is not an Ethernet address`},
		`{"runtimeConfig": {"mac": 5}}`:            {"runtimeConfig: mac: a JSON number does not fit"},
		`{"args": {"cni": {"labels": {}}}}`:        {"args: cni.labels: a JSON object does not fit"},
		`{"args": {"cni": {"labels": [{}]}}}`:      {"args: cni.labels[0]: has no key"},
		`{"cni.dev/valid-attachments": "all"}`:     {"cni.dev/valid-attachments: a JSON string does not fit"},
		`{"mode": "ajar", "attach": "xdp", "?":0}`: {"?: unknown key", "attach:", "mode:"},
	} {
		t.Run(json, func(t *testing.T) {
			_, err := Parse([]byte(json))
			if !errors.Is(err, ErrInvalid) {
				t.Fatalf("got %v, want ErrInvalid", err)
			}
			for _, want := range wants {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%q does not say %q", err, want)
				}
			}
		})
	}
	for _, json := range []string{``, `{`, `[]`, `"x"`, `{} {}`} {
		if _, err := Parse([]byte(json)); !errors.Is(err, ErrDecode) {
			t.Errorf("Parse(%q): %v, want ErrDecode", json, err)
		}
	}
}

func TestParseIPAM(t *testing.T) {
	got, err := ParseIPAM([]byte(`{
		"cniVersion": "1.1.0", "name": "net", "type": "bridge", "bridge": "br0", "mode": "whatever the main plugin takes",
		"ipam": {"type": "podgate-ipam", "instance": "two", "logLevel": "info", "delegate": {"type": "host-local", "subnet": "10.0.0.0/24"}}
	}`))
	if err != nil {
		t.Fatal(err)
	}
	d := Defaults()
	want := &IPAM{
		Delegate:     []byte(`{"type": "host-local", "subnet": "10.0.0.0/24"}`),
		DelegateType: "host-local",
		Instance:     Instance{BPFFS: d.BPFFS, Instance: "two"},
		Log:          Log{LogLevel: slog.LevelInfo},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	for json, fault := range map[string]string{
		`{}`:                                   "ipam: missing",
		`{"ipam": {}}`:                         "delegate: missing",
		`{"ipam": null}`:                       "delegate: missing",
		`{"ipam": {"delegate": {}}}`:           "delegate: has no type",
		`{"ipam": {"delegate": "host-local"}}`: "delegate: a JSON string does not fit",
		`{"ipam": {"delegate": {"type": "x"}, "mode": 1}}`: "mode: unknown key",
	} {
		_, err := ParseIPAM([]byte(json))
		if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), fault) {
			t.Errorf("ParseIPAM(%s): %v, want ErrInvalid saying %q", json, err, fault)
		}
	}
	if _, err := ParseIPAM([]byte(`[]`)); !errors.Is(err, ErrDecode) {
		t.Errorf("ParseIPAM([]): %v, want ErrDecode", err)
	}
}

// FuzzParse looks for input that is accepted although a setting is not one of
// those the kernel side knows.
func FuzzParse(f *testing.F) {
	f.Add([]byte(`{"mode": "open", "waitForPolicy": "1s", "capacity": {"flows": 1, "eventBytes": 4096}}`))
	f.Add([]byte(`{"runtimeConfig": {"mac": "02:00:00:00:00:01"}, "args": {"cni": {"labels": [{"key": "a"}]}}}`))
	f.Add([]byte(`{"cni.dev/valid-attachments": null, "prevResult": {}, "bpffs": "/x", "instance": "y"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := Parse(b)
		if err != nil {
			if !errors.Is(err, ErrDecode) && !errors.Is(err, ErrInvalid) {
				t.Errorf("error of no kind: %v", err)
			}
			return
		}
		switch {
		case !slices.Contains([]Mode{ModeClosed, ModeOpen}, c.Mode),
			!slices.Contains([]Attach{AttachAuto, AttachClsact, AttachTCX}, c.Attach),
			!slices.Contains([]NonVeth{NonVethError, NonVethSkip}, c.NonVeth),
			c.WaitForPolicy < 0 || time.Duration(c.WaitForPolicy) > MaxWait,
			!strings.HasPrefix(c.BPFFS, "/"),
			c.Instance.Instance == "" || strings.ContainsAny(c.Instance.Instance, "./\x00"),
			c.Runtime.MAC != nil && len(c.Runtime.MAC) != 6,
			slices.Contains(slices.Collect(maps.Keys(c.Labels)), ""):
			t.Errorf("accepted %+v", c)
		}
	})
}
