// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"encoding/json"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	cniversion "github.com/containernetworking/cni/pkg/version"

	"github.com/podgate/podgate/pinning"
	"github.com/podgate/podgate/test/need"
	"github.com/podgate/podgate/test/netlab"
)

var versions = []string{"0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"}

func atLeast(t *testing.T, version, other string) bool {
	t.Helper()
	ok, err := cniversion.GreaterThanOrEqualTo(version, other)
	if err != nil {
		t.Fatal(err)
	}
	return ok
}

func TestVersion(t *testing.T) {
	l := newLab(t)
	for _, plugin := range []string{"podgate-cni", "podgate-ipam"} {
		o := l.callRaw(plugin, "VERSION", nil, nil)
		var got struct {
			CNIVersion        string   `json:"cniVersion"`
			SupportedVersions []string `json:"supportedVersions"`
		}
		if err := json.Unmarshal(o.stdout, &got); o.code != 0 || err != nil {
			t.Fatalf("%s: exit %d, stdout %s", plugin, o.code, o.stdout)
		}
		if got.CNIVersion != "1.1.0" || !slices.Equal(got.SupportedVersions, versions) {
			t.Errorf("%s: got %+v, want %v", plugin, got, versions)
		}
	}
}

func TestVerbsInEveryVersion(t *testing.T) {
	for _, main := range []string{"bridge", "ptp"} {
		for _, version := range versions {
			t.Run(main+" "+version, func(t *testing.T) {
				t.Parallel()
				l := newLab(t)
				plugin := l.Bridge("br0", "10.70.0.0/24", "fd70::/64")
				if main == "ptp" {
					plugin = l.PTP("10.70.0.0/24", "fd70::/64")
				}
				l.life(chain(version, plugin, l.Podgate()))
			})
		}
	}
}

// life takes a pod through every verb that the list's version has.
func (l *lab) life(list netlab.Conflist) {
	t, ctx := l.t, l.t.Context()
	p := l.pod(netlab.PodSpec{Namespace: "default", Name: "web.0", UID: "u-1", Labels: map[string]string{"app": "web"}})
	result, err := l.Add(ctx, list, p)
	if err != nil {
		t.Fatal(err)
	}
	if result.Version() != list.CNIVersion {
		t.Errorf("result is of version %s", result.Version())
	}
	e := l.wantEndpoints(key(p))[key(p)]
	if e.PodNamespace != "default" || e.PodName != "web.0" || e.PodUID != "u-1" || e.Labels["app"] != "web" || e.Network != "lab" {
		t.Errorf("endpoint is %+v", e)
	}
	families := map[bool]int{}
	for _, a := range e.Addresses {
		families[a.Is4()]++
	}
	if families[true] != 1 || families[false] != 2 {
		t.Errorf("addresses are %v, want one of each family and a link-local", e.Addresses)
	}
	if atLeast(t, list.CNIVersion, "0.4.0") {
		if err := l.Check(ctx, list, p); err != nil {
			t.Errorf("CHECK: %v", err)
		}
	}
	if err := l.Status(ctx, list); err != nil {
		t.Errorf("STATUS: %v", err)
	}
	valid := []types.GCAttachment{{ContainerID: p.ID, IfName: p.IfName}}
	if err := l.GC(ctx, list, &libcni.GCArgs{ValidAttachments: valid}); err != nil {
		t.Errorf("GC: %v", err)
	}
	l.wantEndpoints(key(p))
	for range 2 {
		if err := l.Del(ctx, list, p); err != nil {
			t.Errorf("DEL: %v", err)
		}
		l.wantEndpoints()
	}
}

// The verbs that a version does not have are refused, so that a runtime does
// not take silence for an answer.
func TestVerbsNotInVersion(t *testing.T) {
	l := newLab(t)
	p := l.pod(netlab.PodSpec{})
	for verb, since := range map[string]string{"CHECK": "0.4.0", "GC": "1.1.0", "STATUS": "1.1.0"} {
		for _, version := range versions {
			if atLeast(t, version, since) {
				continue
			}
			o := l.call(verb, env(p), l.Podgate().With(netlab.Plugin{"cniVersion": version, "name": "lab"}))
			if o.code == 0 || o.err.Code != types.ErrIncompatibleCNIVersion {
				t.Errorf("%s in %s: exit %d, error %+v", verb, version, o.code, o.err)
			}
		}
	}
}

// The plugins after us and the runtime get what the plugins before us said.
func TestResultIsPassedOn(t *testing.T) {
	l := newLab(t)
	list := chain("1.1.0", l.Bridge("br0", "10.71.0.0/24"))
	p := l.pod(netlab.PodSpec{})
	if _, err := l.Add(t.Context(), list, p); err != nil {
		t.Fatal(err)
	}
	prev := map[string]any{
		"cniVersion": "1.1.0",
		"interfaces": []any{
			map[string]any{"name": "br0", "mac": "02:00:00:00:00:01", "mtu": 1500.0},
			map[string]any{"name": "eth0", "sandbox": p.NetNS(), "mtu": 1400.0, "socketPath": "/run/s", "pciID": "0000:00:01.0"},
		},
		"ips": []any{map[string]any{"address": "10.71.0.2/24", "gateway": "10.71.0.1", "interface": 1.0}},
		"routes": []any{map[string]any{
			"dst": "0.0.0.0/0", "gw": "10.71.0.1", "mtu": 1300.0, "advmss": 1200.0, "priority": 1.0, "table": 2.0, "scope": 0.0,
		}},
		"dns": map[string]any{"nameservers": []any{"10.71.0.53"}, "search": []any{"svc"}},
	}
	o := l.call("ADD", env(p), l.Podgate().With(netlab.Plugin{"cniVersion": "1.1.0", "name": "lab", "prevResult": prev}))
	var got map[string]any
	if err := json.Unmarshal(o.stdout, &got); o.code != 0 || err != nil {
		t.Fatalf("exit %d, stdout %s", o.code, o.stdout)
	}
	if !reflect.DeepEqual(got, prev) {
		t.Errorf("result is %v, want %v", got, prev)
	}
}

func TestDelIsIdempotent(t *testing.T) {
	config := func(l *lab) netlab.Plugin {
		return l.Podgate().With(netlab.Plugin{"cniVersion": "1.1.0", "name": "lab"})
	}
	for name, del := range map[string]func(*lab, *netlab.Pod){
		"twice": func(l *lab, p *netlab.Pod) {
			l.silent(l.call("DEL", env(p), config(l)))
			l.silent(l.call("DEL", env(p), config(l)))
		},
		"without CNI_NETNS": func(l *lab, p *netlab.Pod) {
			l.silent(l.call("DEL", map[string]string{"CNI_CONTAINERID": p.ID, "CNI_IFNAME": p.IfName}, config(l)))
		},
		"with empty CNI_NETNS": func(l *lab, p *netlab.Pod) {
			l.silent(l.call("DEL", map[string]string{"CNI_CONTAINERID": p.ID, "CNI_IFNAME": p.IfName, "CNI_NETNS": ""}, config(l)))
		},
		"after the pod is gone": func(l *lab, p *netlab.Pod) {
			e := env(p)
			p.Close()
			l.silent(l.call("DEL", e, config(l)))
		},
		"after the interface is gone": func(l *lab, p *netlab.Pod) {
			need.Tools(l.t, "ip")
			if _, err := p.Exec(l.t.Context(), "ip", "link", "del", p.IfName); err != nil {
				l.t.Fatal(err)
			}
			l.silent(l.call("DEL", env(p), config(l)))
		},
		"with CNI_ARGS that nobody can read": func(l *lab, p *netlab.Pod) {
			e := env(p)
			e["CNI_ARGS"] = "?"
			l.silent(l.call("DEL", e, config(l)))
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := newLab(t)
			p := l.pod(netlab.PodSpec{})
			if _, err := l.Add(t.Context(), chain("1.1.0", l.Bridge("br0", "10.72.0.0/24"), l.Podgate()), p); err != nil {
				t.Fatal(err)
			}
			l.wantEndpoints(key(p))
			del(l, p)
			l.wantEndpoints()
		})
	}
	t.Run("never added", func(t *testing.T) {
		t.Parallel()
		l := newLab(t)
		other, _ := l.add(chain("1.1.0", l.Bridge("br0", "10.72.0.0/24"), l.Podgate()), netlab.PodSpec{})
		p := l.pod(netlab.PodSpec{})
		l.silent(l.call("DEL", env(p), config(l)))
		l.wantEndpoints(key(other))
	})
	t.Run("never installed", func(t *testing.T) {
		t.Parallel()
		l := newLab(t)
		p := l.pod(netlab.PodSpec{})
		l.silent(l.call("DEL", env(p), config(l)))
		if _, err := pinning.Open(t.Context(), l.options()); err == nil {
			t.Error("DEL has installed podgate")
		}
	})
}

func TestGC(t *testing.T) {
	valid := func(pods ...*netlab.Pod) []any {
		list := []any{}
		for _, p := range pods {
			list = append(list, map[string]string{"containerID": p.ID, "ifname": p.IfName})
		}
		return list
	}
	for name, test := range map[string]struct {
		list func(a, b *netlab.Pod) netlab.Plugin
		want func(a, b, other *netlab.Pod) []*netlab.Pod
	}{
		"no list keeps all": {
			func(_, _ *netlab.Pod) netlab.Plugin { return nil },
			func(a, b, other *netlab.Pod) []*netlab.Pod { return []*netlab.Pod{a, b, other} },
		},
		"empty list keeps nothing of this network": {
			func(_, _ *netlab.Pod) netlab.Plugin { return netlab.Plugin{"cni.dev/valid-attachments": valid()} },
			func(_, _, other *netlab.Pod) []*netlab.Pod { return []*netlab.Pod{other} },
		},
		"null is an empty list": {
			func(_, _ *netlab.Pod) netlab.Plugin { return netlab.Plugin{"cni.dev/valid-attachments": nil} },
			func(_, _, other *netlab.Pod) []*netlab.Pod { return []*netlab.Pod{other} },
		},
		"list keeps what it names": {
			func(a, _ *netlab.Pod) netlab.Plugin { return netlab.Plugin{"cni.dev/valid-attachments": valid(a)} },
			func(a, _, other *netlab.Pod) []*netlab.Pod { return []*netlab.Pod{a, other} },
		},
		"list by its older name": {
			func(a, _ *netlab.Pod) netlab.Plugin { return netlab.Plugin{"cni.dev/attachments": valid(a)} },
			func(a, _, other *netlab.Pod) []*netlab.Pod { return []*netlab.Pod{a, other} },
		},
		"another attachment of the container does not keep this one": {
			func(_, b *netlab.Pod) netlab.Plugin {
				return netlab.Plugin{"cni.dev/valid-attachments": valid(b.Interface("net9"))}
			},
			func(_, _, other *netlab.Pod) []*netlab.Pod { return []*netlab.Pod{other} },
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := newLab(t)
			list := chain("1.1.0", l.Bridge("br0", "10.73.0.0/24"), l.Podgate())
			elsewhere := list
			elsewhere.Name = "elsewhere"
			a, _ := l.add(list, netlab.PodSpec{})
			b, _ := l.add(list, netlab.PodSpec{})
			other, _ := l.add(elsewhere, netlab.PodSpec{})
			l.silent(l.call("GC", nil, l.Podgate().With(netlab.Plugin{"cniVersion": "1.1.0", "name": "lab"}).With(test.list(a, b))))
			var want []pinning.AttachmentKey
			for _, p := range test.want(a, b, other) {
				want = append(want, key(p))
			}
			l.wantEndpoints(want...)
		})
	}
	t.Run("never installed", func(t *testing.T) {
		t.Parallel()
		l := newLab(t)
		l.silent(l.call("GC", nil, l.Podgate().With(netlab.Plugin{
			"cniVersion": "1.1.0", "name": "lab", "cni.dev/valid-attachments": valid(),
		})))
	})
}

func TestSixteenAddsAtOnce(t *testing.T) {
	l := newLab(t)
	list := chain("1.1.0", l.Bridge("br0", "10.74.0.0/24"), l.Podgate())
	type outcome struct {
		pod *netlab.Pod
		err error
	}
	outcomes := make(chan outcome)
	// Nothing is installed: the first few also race for that.
	for range 16 {
		go func() {
			p, _, err := l.AddPod(t.Context(), list, netlab.PodSpec{})
			outcomes <- outcome{p, err}
		}()
	}
	var pods []*netlab.Pod
	var keys []pinning.AttachmentKey
	for range 16 {
		o := <-outcomes
		if o.err != nil {
			t.Error(o.err)
			continue
		}
		pods, keys = append(pods, o.pod), append(keys, key(o.pod))
	}
	gates, addresses := map[uint32]bool{}, map[netip.Addr]bool{}
	for _, e := range l.wantEndpoints(keys...) {
		gates[e.Gate] = true
		for _, a := range e.Addresses {
			addresses[a] = true
		}
	}
	if len(gates) != len(pods) || len(addresses) != 2*len(pods) {
		t.Errorf("%d pods have %d gates and %d addresses", len(pods), len(gates), len(addresses))
	}
	failures := make(chan error)
	for _, p := range pods {
		go func() { failures <- l.DelPod(t.Context(), p) }()
	}
	for range pods {
		if err := <-failures; err != nil {
			t.Error(err)
		}
	}
	l.wantEndpoints()
}

func TestCheckFindsWhatIsGone(t *testing.T) {
	for name, damage := range map[string]struct {
		do   func(*lab, *netlab.Pod)
		code uint
		says string
	}{
		"attachment": {func(l *lab, p *netlab.Pod) {
			if err := l.state().Delete(l.t.Context(), key(p)); err != nil {
				l.t.Fatal(err)
			}
		}, codeCheck, "eth0"},
		"hooks": {func(l *lab, p *netlab.Pod) {
			need.Tools(l.t, "tc")
			l.exec("tc", "qdisc", "del", "dev", l.hostVeth(p), "clsact")
		}, codeCheck, "eth0"},
		"interface": {func(l *lab, p *netlab.Pod) {
			need.Tools(l.t, "ip")
			if _, err := p.Exec(l.t.Context(), "ip", "link", "del", "eth0"); err != nil {
				l.t.Fatal(err)
			}
		}, codeNoInterface, "eth0"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := newLab(t)
			list := chain("1.1.0", l.Bridge("br0", "10.75.0.0/24"), l.Podgate())
			p, r := l.add(list, netlab.PodSpec{})
			config := l.Podgate().With(netlab.Plugin{"cniVersion": "1.1.0", "name": "lab", "prevResult": r})
			l.silent(l.call("CHECK", env(p), config))
			damage.do(l, p)
			o := l.call("CHECK", env(p), config)
			if o.code == 0 || o.err.Code != damage.code || !strings.Contains(o.err.Msg, damage.says) {
				t.Errorf("exit %d, error %+v", o.code, o.err)
			}
		})
	}
	t.Run("everything", func(t *testing.T) {
		t.Parallel()
		l := newLab(t)
		list := chain("1.1.0", l.Bridge("br0", "10.75.0.0/24"))
		p, r := l.add(list, netlab.PodSpec{})
		o := l.call("CHECK", env(p), l.Podgate().With(netlab.Plugin{"cniVersion": "1.1.0", "name": "lab", "prevResult": r}))
		if o.code == 0 || o.err.Code != codeCheck {
			t.Errorf("exit %d, error %+v", o.code, o.err)
		}
	})
}

func TestStatus(t *testing.T) {
	l := newLab(t)
	config := l.Podgate().With(netlab.Plugin{"cniVersion": "1.1.0", "name": "lab"})
	l.silent(l.call("STATUS", nil, config))
	if _, err := pinning.Open(t.Context(), l.options()); err == nil {
		t.Fatal("STATUS has installed podgate")
	}
	l.add(chain("1.1.0", l.Bridge("br0", "10.76.0.0/24"), l.Podgate()), netlab.PodSpec{})
	l.silent(l.call("STATUS", nil, config))
	o := l.call("STATUS", nil, config.With(netlab.Plugin{"bpffs": "/nowhere/bpf"}))
	if o.code == 0 || o.err.Code != types.ErrPluginNotAvailable || !strings.Contains(o.err.Msg, "/nowhere/bpf") {
		t.Errorf("no bpffs: exit %d, error %+v", o.code, o.err)
	}
}

// Logs go where the configuration says and never to stdout, which is the
// runtime's.
func TestLogging(t *testing.T) {
	l := newLab(t)
	p, r := l.add(chain("1.1.0", l.Bridge("br0", "10.97.0.0/24")), netlab.PodSpec{})
	config := l.Podgate().With(netlab.Plugin{"cniVersion": "1.1.0", "name": "lab", "prevResult": r, "logLevel": "info"})
	for name, test := range map[string]struct {
		file   string
		logged bool
	}{
		"to a file":                 {filepath.Join(l.Dir, "log"), true},
		"to a file that cannot be":  {filepath.Join(l.Dir, "no", "such", "directory"), false},
		"to stderr, without a file": {"", false},
	} {
		t.Run(name, func(t *testing.T) {
			l := &lab{Node: l.Node, t: t}
			c := config
			if test.file != "" {
				c = c.With(netlab.Plugin{"logFile": test.file})
			}
			o := l.call("ADD", env(p), c)
			if o.code != 0 || !json.Valid(o.stdout) {
				t.Errorf("exit %d, stdout %s", o.code, o.stdout)
			}
			b, err := os.ReadFile(test.file)
			if logged := err == nil && strings.Contains(string(b), p.ID); logged != test.logged {
				t.Errorf("log file: %v, %q", err, b)
			}
		})
	}
}

func TestParseArgs(t *testing.T) {
	for args, want := range map[string]podArgs{
		"": {},
		"IgnoreUnknown=1;K8S_POD_NAMESPACE=ns;K8S_POD_NAME=web.0;K8S_POD_INFRA_CONTAINER_ID=c;K8S_POD_UID=u": {"ns", "web.0", "u"},
		"K8S_POD_NAME=web;":        {name: "web"},
		"MAC=02:00:00:00:00:01;X=": {},
		"K8S_POD_NAME=a=b":         {name: "a=b"},
		"k8s_pod_name=a":           {},
	} {
		got, err := parseArgs(args)
		if err != nil || got != want {
			t.Errorf("%q: got %+v, %v; want %+v", args, got, err, want)
		}
	}
	for _, args := range []string{"x", "K8S_POD_NAME", "a=b;c"} {
		if _, err := parseArgs(args); !errors.Is(err, errArgs) {
			t.Errorf("%q: %v, want errArgs", args, err)
		}
	}
}
