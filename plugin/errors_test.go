// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/podgate/podgate/conf"
	"github.com/podgate/podgate/pinning"
	"github.com/podgate/podgate/test/netlab"
)

// errorCase is one way to call ADD wrongly. The pod is in the bridge's network
// and has eth0; env and config start out right.
type errorCase struct {
	verb    string
	arrange func(l *lab, p *netlab.Pod, env map[string]string, config netlab.Plugin)
	code    uint
	says    []string
}

func TestErrorCodes(t *testing.T) {
	unset := func(key string) func(*lab, *netlab.Pod, map[string]string, netlab.Plugin) {
		return func(_ *lab, _ *netlab.Pod, env map[string]string, _ netlab.Plugin) { env[key] = "" }
	}
	set := func(key string, value any) func(*lab, *netlab.Pod, map[string]string, netlab.Plugin) {
		return func(_ *lab, _ *netlab.Pod, _ map[string]string, config netlab.Plugin) { config[key] = value }
	}
	l := newLab(t)
	p, r := l.add(chain("1.1.0", l.Bridge("br0", "10.77.0.0/24")), netlab.PodSpec{})
	for name, test := range map[string]errorCase{
		"version of the future":         {"ADD", set("cniVersion", "7.0.0"), types.ErrIncompatibleCNIVersion, []string{"7.0.0"}},
		"version before prevResult":     {"ADD", set("cniVersion", "0.2.0"), types.ErrIncompatibleCNIVersion, []string{"0.2.0"}},
		"no version":                    {"ADD", set("cniVersion", ""), types.ErrIncompatibleCNIVersion, nil},
		"no container ID":               {"ADD", unset("CNI_CONTAINERID"), types.ErrInvalidEnvironmentVariables, []string{"CNI_CONTAINERID"}},
		"no interface name":             {"ADD", unset("CNI_IFNAME"), types.ErrInvalidEnvironmentVariables, []string{"CNI_IFNAME"}},
		"no namespace":                  {"ADD", unset("CNI_NETNS"), types.ErrInvalidEnvironmentVariables, []string{"CNI_NETNS"}},
		"no path":                       {"ADD", unset("CNI_PATH"), types.ErrInvalidEnvironmentVariables, []string{"CNI_PATH"}},
		"verb of another specification": {"MOVE", unset(""), types.ErrInvalidEnvironmentVariables, []string{"MOVE"}},
		"CNI_ARGS that are no pairs": {"ADD", func(_ *lab, _ *netlab.Pod, env map[string]string, _ netlab.Plugin) {
			env["CNI_ARGS"] = "K8S_POD_NAME"
		}, types.ErrInvalidEnvironmentVariables, []string{"CNI_ARGS", "K8S_POD_NAME"}},
		"no network name":          {"ADD", set("name", ""), types.ErrInvalidNetworkConfig, []string{"name"}},
		"unknown key":              {"ADD", set("moed", "open"), types.ErrInvalidNetworkConfig, []string{"moed"}},
		"unknown value":            {"ADD", set("mode", "ajar"), types.ErrInvalidNetworkConfig, []string{"mode", "ajar"}},
		"no prevResult":            {"ADD", set("prevResult", nil), types.ErrInvalidNetworkConfig, []string{"prevResult"}},
		"CHECK without prevResult": {"CHECK", set("prevResult", nil), types.ErrInvalidNetworkConfig, []string{"prevResult"}},
		"prevResult of no kind":    {"ADD", set("prevResult", netlab.Plugin{"cniVersion": "1.1.0", "ips": "?"}), types.ErrDecodingFailure, []string{"prevResult"}},
		"namespace that is gone": {"ADD", func(_ *lab, _ *netlab.Pod, env map[string]string, _ netlab.Plugin) {
			env["CNI_NETNS"] = "/var/run/netns/gone"
		}, types.ErrInvalidNetNS, []string{"CNI_NETNS", "/var/run/netns/gone"}},
		"namespace that is none": {"ADD", func(l *lab, _ *netlab.Pod, env map[string]string, _ netlab.Plugin) {
			file := filepath.Join(l.Dir, "file")
			if err := os.WriteFile(file, nil, 0o600); err != nil {
				l.t.Fatal(err)
			}
			env["CNI_NETNS"] = file
		}, types.ErrInvalidNetNS, []string{"CNI_NETNS", "file"}},
		"namespace of the host": {"ADD", func(l *lab, _ *netlab.Pod, env map[string]string, _ netlab.Plugin) {
			env["CNI_NETNS"] = l.NetNS()
		}, types.ErrInvalidNetNS, []string{"CNI_NETNS", "host"}},
		"interface that is not there": {"ADD", func(_ *lab, _ *netlab.Pod, env map[string]string, _ netlab.Plugin) {
			env["CNI_IFNAME"] = "eth9"
		}, codeNoInterface, []string{"eth9"}},
		"interface without peer": {"ADD", func(_ *lab, _ *netlab.Pod, env map[string]string, _ netlab.Plugin) {
			env["CNI_IFNAME"] = "lo"
		}, codeNotVeth, []string{"lo"}},
	} {
		t.Run(name, func(t *testing.T) {
			l := &lab{Node: l.Node, t: t}
			env := env(p)
			config := l.Podgate().With(netlab.Plugin{"cniVersion": "1.1.0", "name": "lab", "prevResult": r})
			test.arrange(l, p, env, config)
			maps.DeleteFunc(config, func(_ string, v any) bool { return v == nil || v == "" })
			o := l.call(test.verb, env, config)
			if o.code == 0 || o.err.Code != test.code {
				t.Errorf("exit %d, error %+v; want code %d", o.code, o.err, test.code)
			}
			for _, want := range test.says {
				if !strings.Contains(o.err.Error(), want) {
					t.Errorf("%q does not say %q", o.err.Error(), want)
				}
			}
			l.wantEndpoints()
		})
	}
	for stdin, code := range map[string]uint{"": types.ErrDecodingFailure, "{": types.ErrDecodingFailure, "[]": types.ErrDecodingFailure} {
		if o := l.callRaw("podgate-cni", "ADD", env(p), []byte(stdin)); o.code == 0 || o.err.Code != code {
			t.Errorf("stdin %q: exit %d, error %+v", stdin, o.code, o.err)
		}
	}
}

// The codes that no call can be made to give at will.
func TestCodeOfErrors(t *testing.T) {
	for _, test := range []struct {
		err  error
		code uint
	}{
		{errors.New("x"), types.ErrInternal},
		{fmt.Errorf("add: %w", pinning.ErrFull), codeFull},
		{fmt.Errorf("add: %w", pinning.ErrNoHook), codeNoHook},
		{fmt.Errorf("add: %w", pinning.ErrABI), codeState},
		{fmt.Errorf("add: %w", pinning.ErrLocked), types.ErrTryAgainLater},
		{fmt.Errorf("%w: %w", errNotReady, pinning.ErrFull), types.ErrPluginNotAvailable},
		{fmt.Errorf("%w: %w", errCheck, pinning.ErrNotFound), codeCheck},
		{fmt.Errorf("pin: %w", &os.PathError{Op: "open", Path: "/x", Err: os.ErrPermission}), types.ErrIOFailure},
		{fmt.Errorf("x: %w", conf.ErrDecode), types.ErrDecodingFailure},
		{fmt.Errorf("delegate: %w", &types.Error{Code: 77, Msg: "m"}), 77},
	} {
		var e *types.Error
		if !errors.As(coded(test.err), &e) || e.Code != test.code || e.Msg != test.err.Error() {
			t.Errorf("%v: got %+v, want code %d", test.err, e, test.code)
		}
	}
	if coded(nil) != nil {
		t.Error("no error has a code")
	}
}

func TestErrorsAreInTheVersionOfTheCall(t *testing.T) {
	l := newLab(t)
	p := l.pod(netlab.PodSpec{})
	for _, version := range versions {
		for _, mode := range []string{"closed", "ajar"} {
			o := l.call("ADD", env(p), l.Podgate().With(netlab.Plugin{"cniVersion": version, "name": "lab", "mode": mode}))
			var e struct{ CNIVersion string }
			if err := json.Unmarshal(o.stdout, &e); err != nil || e.CNIVersion != version {
				t.Errorf("error of a %s call: %s", version, o.stdout)
			}
		}
	}
}
