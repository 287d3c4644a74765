// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package ipamhooks

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"strings"
	"testing"
)

func addresses(s ...string) (a []netip.Addr) {
	for _, s := range s {
		a = append(a, netip.MustParseAddr(s))
	}
	return a
}

func TestPodInterfaces(t *testing.T) {
	const v4, v6 = `{"address": "10.0.0.2/24"}`, `{"address": "fd00::2/64"}`
	for name, test := range map[string]struct {
		versions []string
		result   string
		want     []Interface
	}{
		"bridge: host interfaces first": {
			[]string{"0.3.0", "0.3.1", "0.4.0"},
			`"interfaces": [{"name": "cni0"}, {"name": "veth1"}, {"name": "eth0", "sandbox": "/ns"}],
			 "ips": [{"version": "4", "interface": 2, "address": "10.0.0.2/24"}, {"version": "6", "interface": 2, "address": "fd00::2/64"}]`,
			[]Interface{{Name: "eth0", Addresses: addresses("10.0.0.2", "fd00::2")}},
		},
		"since 1.0.0 without the family": {
			[]string{"1.0.0", "1.1.0"},
			`"interfaces": [{"name": "veth1"}, {"name": "eth0", "sandbox": "/ns"}],
			 "ips": [{"interface": 1, "address": "10.0.0.2/24"}, {"interface": 1, "address": "fd00::2/64"}]`,
			[]Interface{{Name: "eth0", Addresses: addresses("10.0.0.2", "fd00::2")}},
		},
		"address that points to no interface": {
			[]string{"1.0.0", "1.1.0"},
			`"interfaces": [{"name": "eth0", "sandbox": "/ns"}], "ips": [` + v4 + `,` + v6 + `]`,
			[]Interface{{Name: "eth0", Addresses: addresses("10.0.0.2", "fd00::2")}},
		},
		"no host interface and no pod interface listed": {
			[]string{"1.1.0"}, `"ips": [` + v4 + `]`,
			[]Interface{{Name: "eth0", Addresses: addresses("10.0.0.2")}},
		},
		"address that points to the host's interface or nowhere": {
			[]string{"1.1.0"},
			`"interfaces": [{"name": "veth1"}, {"name": "eth0", "sandbox": "/ns"}],
			 "ips": [{"interface": 0, "address": "10.0.0.2/24"}, {"interface": 7, "address": "10.0.0.3/24"}, {"interface": -1, "address": "10.0.0.4/24"}]`,
			[]Interface{{Name: "eth0", Addresses: addresses("10.0.0.2", "10.0.0.3", "10.0.0.4")}},
		},
		"second interface before the attachment's own": {
			[]string{"1.1.0"},
			`"interfaces": [{"name": "eth1", "sandbox": "/ns"}, {"name": "veth1"}, {"name": "eth0", "sandbox": "/ns"}],
			 "ips": [{"interface": 0, "address": "10.1.0.2/24"}, {"interface": 2, "address": "10.0.0.2/24"}]`,
			[]Interface{{Name: "eth0", Addresses: addresses("10.0.0.2")}, {Name: "eth1", Addresses: addresses("10.1.0.2")}},
		},
		"no address": {
			[]string{"0.3.1", "0.4.0", "1.0.0", "1.1.0"}, `"interfaces": [{"name": "eth0", "sandbox": "/ns"}]`,
			[]Interface{{Name: "eth0"}},
		},
		"IPv4 address in IPv6 form": {
			[]string{"1.1.0"}, `"ips": [{"address": "::ffff:10.0.0.2/128"}]`,
			[]Interface{{Name: "eth0", Addresses: addresses("10.0.0.2")}},
		},
		"gateways": {
			[]string{"0.4.0", "1.1.0"},
			`"interfaces": [{"name": "eth0", "sandbox": "/ns"}],
			 "ips": [{"version": "4", "interface": 0, "address": "10.0.0.2/24", "gateway": "10.0.0.1"},
			         {"version": "6", "interface": 0, "address": "fd00::2/64", "gateway": "fd00::1"}]`,
			[]Interface{{Name: "eth0", Addresses: addresses("10.0.0.2", "fd00::2"), Gateways: addresses("10.0.0.1", "fd00::1")}},
		},
		"MAC that is none, sandbox that is none": {
			[]string{"0.4.0", "1.0.0"},
			`"interfaces": [{"name": "eni1"}, {"name": "eth0", "sandbox": "/ns"}, {"name": "dummy1", "mac": "0", "sandbox": "1"}],
			 "ips": [{"version": "4", "interface": 1, "address": "10.0.0.2/32"}]`,
			[]Interface{{Name: "eth0", Addresses: addresses("10.0.0.2")}, {Name: "dummy1"}},
		},
	} {
		for _, version := range test.versions {
			t.Run(name+" in "+version, func(t *testing.T) {
				for _, own := range []string{fmt.Sprintf(`"cniVersion": %q,`, version), ""} {
					result, err := ParseResult(version, []byte("{"+own+test.result+"}"))
					if err != nil {
						t.Fatal(err)
					}
					if result.Version() != version {
						t.Errorf("result is of version %s, want %s", result.Version(), version)
					}
					got, err := PodInterfaces(result, "eth0")
					if err != nil {
						t.Fatal(err)
					}
					if !reflect.DeepEqual(got, test.want) {
						t.Errorf("got %v, want %v", got, test.want)
					}
				}
			})
		}
	}
}

// What a plugin does not change must come out as it went in.
func TestResultKeepsEveryField(t *testing.T) {
	for version, result := range map[string]string{
		"0.3.1": `{"cniVersion": "0.3.1", "interfaces": [{"name": "eth0", "mac": "02:00:00:00:00:01", "sandbox": "/ns"}],
			"ips": [{"version": "4", "interface": 0, "address": "10.0.0.2/24", "gateway": "10.0.0.1"}],
			"routes": [{"dst": "0.0.0.0/0", "gw": "10.0.0.1"}], "dns": {"nameservers": ["10.0.0.53"], "domain": "d", "search": ["s"], "options": ["o"]}}`,
		"1.1.0": `{"cniVersion": "1.1.0",
			"interfaces": [{"name": "eth0", "mac": "02:00:00:00:00:01", "sandbox": "/ns", "mtu": 1400, "socketPath": "/s", "pciID": "0000:00:01.0"}],
			"ips": [{"interface": 0, "address": "fd00::2/64", "gateway": "fd00::1"}],
			"routes": [{"dst": "::/0", "gw": "fd00::1", "mtu": 1300, "advmss": 1200, "priority": 5, "table": 7, "scope": 0}],
			"dns": {"nameservers": ["fd00::53"]}}`,
	} {
		t.Run(version, func(t *testing.T) {
			r, err := ParseResult(version, []byte(result))
			if err != nil {
				t.Fatal(err)
			}
			var out bytes.Buffer
			if err := r.PrintTo(&out); err != nil {
				t.Fatal(err)
			}
			var got, want any
			if err := errors.Join(json.Unmarshal(out.Bytes(), &got), json.Unmarshal([]byte(result), &want)); err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(got, want) {
				t.Errorf("got  %v\nwant %v", got, want)
			}
		})
	}
}

func TestResultInTheVersionAskedFor(t *testing.T) {
	r, err := ParseResult("0.4.0", []byte(`{"cniVersion": "1.1.0", "ips": [{"address": "10.0.0.2/24"}]}`))
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := r.PrintTo(&out); err != nil {
		t.Fatal(err)
	}
	if r.Version() != "0.4.0" || !strings.Contains(out.String(), `"version": "4"`) {
		t.Errorf("got %s", out.String())
	}
}

func TestUnreadableResults(t *testing.T) {
	for _, raw := range []string{
		``, `null`, `[]`, `"x"`,
		`{"cniVersion": "7.0.0"}`,
		`{"cniVersion": "1.1.0", "ips": {}}`,
		`{"cniVersion": "1.1.0", "ips": [{"address": "10.0.0.2"}]}`,
		`{"cniVersion": "1.1.0", "ips": [{}]}`,
		`{"cniVersion": "1.1.0", "ips": [{"address": "0.0.0.0/0"}]}`,
		`{"cniVersion": "1.1.0", "ips": [{"address": "::/0"}]}`,
		`{"cniVersion": "1.1.0", "ips": [null]}`,
		`{"cniVersion": "0.4.0", "interfaces": [null]}`,
	} {
		result, err := ParseResult("1.1.0", []byte(raw))
		if err == nil {
			_, err = PodInterfaces(result, "eth0")
		}
		if !errors.Is(err, ErrResult) {
			t.Errorf("%s: %v, want ErrResult", raw, err)
		}
	}
}

// FuzzResult looks for results that make us panic, lose the attachment's
// interface or claim an address that no packet can have.
func FuzzResult(f *testing.F) {
	f.Add("1.1.0", []byte(`{"cniVersion": "1.1.0", "interfaces": [{"name": "eth0", "sandbox": "/ns"}], "ips": [{"interface": 0, "address": "10.0.0.2/24"}]}`))
	f.Add("0.3.1", []byte(`{"interfaces": [{"name": "a"}, {"name": "a", "sandbox": "b"}], "ips": [{"version": "6", "address": "fd00::/8"}], "routes": [{"dst": "::/0"}]}`))
	f.Add("0.4.0", []byte(`{"cniVersion": "1.0.0", "dns": {}}`))
	f.Fuzz(func(t *testing.T, version string, raw []byte) {
		result, err := ParseResult(version, raw)
		if err != nil {
			return
		}
		pod, err := PodInterfaces(result, "eth0")
		if err != nil {
			return
		}
		names := map[string]bool{}
		for i, p := range pod {
			if i == 0 && p.Name != "eth0" || names[p.Name] {
				t.Errorf("%s: got %v", raw, pod)
			}
			names[p.Name] = true
			for _, a := range p.Addresses {
				if !a.IsValid() || a.IsUnspecified() || a.Is4In6() || a.Zone() != "" {
					t.Errorf("%s: address %v", raw, a)
				}
			}
		}
	})
}
