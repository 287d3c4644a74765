// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package samples

import (
	"io/fs"
	"testing"

	"github.com/containernetworking/cni/libcni"

	"github.com/podgate/podgate/conf"
)

func TestSamples(t *testing.T) {
	mains := map[string]string{
		"bridge.conflist":      "bridge",
		"ptp.conflist":         "ptp",
		"kindnet.conflist":     "ptp",
		"flannel.conflist":     "flannel",
		"aws-vpc-cni.conflist": "aws-cni",
	}
	files, err := fs.Glob(FS, "*")
	if err != nil {
		t.Fatal(err)
	}
	if len(files) != len(mains) {
		t.Errorf("samples are %v, want %d", files, len(mains))
	}
	for _, file := range files {
		t.Run(file, func(t *testing.T) { parse(t, file, mains[file]) })
	}
}

func parse(t *testing.T, file, main string) {
	b, err := FS.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	list, err := libcni.NetworkConfFromBytes(b)
	if err != nil {
		t.Fatal(err)
	}
	if got := list.Plugins[0].Network.Type; got != main {
		t.Errorf("main plugin is %s, want %s", got, main)
	}
	gates := 0
	for _, p := range list.Plugins {
		if p.Network.IPAM.Type == "podgate-ipam" {
			if _, err := conf.ParseIPAM(p.Bytes); err != nil {
				t.Error(err)
			}
		}
		if p.Network.Type != "podgate-cni" {
			continue
		}
		gates++
		if _, err := conf.Parse(p.Bytes); err != nil {
			t.Error(err)
		}
		for _, capability := range []string{"bandwidth", "mac"} {
			if !p.Network.Capabilities[capability] {
				t.Errorf("podgate-cni does not ask for the %s capability", capability)
			}
		}
	}
	if gates != 1 {
		t.Errorf("podgate-cni is there %d times, want once", gates)
	}
}
