// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package conflist

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const (
	flannelList   = `{"cniVersion":"1.0.0","name":"cbr0","plugins":[{"type":"flannel"}]}`
	bridgeSingle  = `{"cniVersion":"0.4.0","name":"old","type":"bridge"}`
	multusByPath  = `{"name":"m","type":"multus","clusterNetwork":"/host/etc/cni/net.d/10-flannel.conflist"}`
	multusByName  = `{"name":"m","type":"multus","clusterNetwork":"cbr0","confDir":"DIR/named"}`
	multusByDir   = `{"name":"m","type":"multus","clusterNetwork":"DIR"}`
	multusInline  = `{"name":"m","type":"multus","delegates":[` + flannelList + `]}`
	multusSingle  = `{"name":"m","type":"multus","delegates":[` + bridgeSingle + `]}`
	multusNothing = `{"name":"m","type":"multus"}`
)

func TestPick(t *testing.T) {
	for name, test := range map[string]struct {
		files   map[string]string
		path    string
		form    Form
		network string
		skipped int
		fails   error
	}{
		"nothing":             {files: map[string]string{"README": "x", "10-x.conflist.bak": flannelList}, fails: ErrNone},
		"a list":              {files: map[string]string{"10-x.conflist": flannelList}, path: "10-x.conflist", network: "cbr0"},
		"the first by name":   {files: map[string]string{"20-x.conflist": flannelList, "10-y.conf": bridgeSingle}, path: "10-y.conf", form: FormSingle, network: "old"},
		"whatever its ending": {files: map[string]string{"20-x.conflist": flannelList, "10-y.json": bridgeSingle}, path: "10-y.json", form: FormSingle, network: "old"},
		"after a broken one":  {files: map[string]string{"20-x.conflist": flannelList, "10-y.conf": flannelList, "11-z.conflist": "{"}, path: "20-x.conflist", network: "cbr0", skipped: 2},
		"only broken ones":    {files: map[string]string{"10-y.conf": flannelList}, fails: ErrNone},
		"multus, a path of its container": {
			files: map[string]string{"00-multus.conf": multusByPath, "10-flannel.conflist": flannelList},
			path:  "10-flannel.conflist", network: "cbr0",
		},
		"multus, a name": {
			files: map[string]string{"00-multus.conf": multusByName, "named/5.conflist": flannelList, "named/4.conf": bridgeSingle},
			path:  "named/5.conflist", network: "cbr0",
		},
		"multus, a directory with itself in it": {
			files: map[string]string{"00-multus.conf": multusByDir, "10-flannel.conflist": flannelList},
			path:  "10-flannel.conflist", network: "cbr0", skipped: 1,
		},
		"multus as a list": {
			files: map[string]string{"00-multus.conflist": `{"cniVersion":"1.0.0","name":"m","plugins":[` + multusByPath + `]}`, "10-flannel.conflist": flannelList},
			path:  "10-flannel.conflist", network: "cbr0",
		},
		"multus, a list within":      {files: map[string]string{"00-multus.conf": multusInline}, path: "00-multus.conf", form: FormDelegate, network: "cbr0"},
		"multus, one plugin within":  {files: map[string]string{"00-multus.conf": multusSingle, "10-x.conflist": flannelList}, fails: ErrDelegate},
		"multus, nothing":            {files: map[string]string{"00-multus.conf": multusNothing}, fails: ErrDelegate},
		"multus, a name that is not": {files: map[string]string{"00-multus.conf": multusByName, "10-x.conflist": flannelList}, fails: ErrDelegate},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			for file, text := range test.files {
				path := filepath.Join(dir, file)
				if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(path, []byte(strings.ReplaceAll(text, "DIR", dir)), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			f, err := Pick(dir)
			if !errors.Is(err, test.fails) || (err == nil) != (test.fails == nil) {
				t.Fatalf("got %v, want %v", err, test.fails)
			}
			if err != nil {
				return
			}
			if f.Path != filepath.Join(dir, test.path) || f.Form != test.form || f.Network != test.network || len(f.Skipped) != test.skipped {
				t.Errorf("got %+v", f)
			}
		})
	}
	if _, err := Pick(filepath.Join(t.TempDir(), "absent")); !errors.Is(err, ErrNone) {
		t.Errorf("no directory: %v, want ErrNone", err)
	}
}

// Plugins of the folder that goes with a list belong to the network.
func TestPickFolder(t *testing.T) {
	dir := t.TempDir()
	for file, text := range map[string]string{
		"10-x.conflist":   `{"cniVersion":"1.1.0","name":"net","plugins":[{"type":"bridge"}]}`,
		"net/5-mine.conf": `{"type":"tuning","capabilities":{"mac":true}}`,
	} {
		path := filepath.Join(dir, file)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	f, err := Pick(dir)
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(f.Path)
	if err != nil {
		t.Fatal(err)
	}
	after, err := f.Merge(b, Entry{})
	if err != nil || !strings.Contains(string(after), `"capabilities":{"mac":true}`) {
		t.Errorf("got %s (%v)", after, err)
	}
}

// A single plugin becomes the only one of a list that libcni reads the same.
func TestFromSingle(t *testing.T) {
	f := File{Path: "/etc/cni/net.d/10-old.conf", Form: FormSingle}
	got, err := f.Merge([]byte(`{"cniVersion":"0.3.1","name":"old","type":"bridge","x":"a<b","n":[1.50]}`), Entry{})
	if err != nil {
		t.Fatal(err)
	}
	want := `{
  "cniVersion": "0.3.1",
  "name": "old",
  "plugins": [
    {
      "cniVersion": "0.3.1",
      "name": "old",
      "type": "bridge",
      "x": "a<b",
      "n": [
        1.50
      ]
    },
    {
      "type": "podgate-cni"
    }
  ]
}
`
	if string(got) != want || f.ListPath() != "/etc/cni/net.d/10-old.conflist" {
		t.Errorf("got %s at %s", got, f.ListPath())
	}
	for text, fails := range map[string]error{
		`{"type":"bridge"}`: ErrList, `{"name":"x"}`: ErrList, `[]`: ErrList, `{"name":"x","type":"bridge"}`: ErrVersion,
	} {
		if _, err := f.Merge([]byte(text), Entry{}); !errors.Is(err, fails) {
			t.Errorf("%s: %v, want %v", text, err, fails)
		}
	}
}

func TestGated(t *testing.T) {
	dir := t.TempDir()
	gated := func(name string) string {
		return `{"cniVersion":"1.0.0","name":"` + name + `","plugins":[{"type":"bridge"},{"type":"podgate-cni"}]}`
	}
	for file, text := range map[string]string{
		"00-multus.conf":  `{"name":"m","type":"multus","delegates":[` + gated("inner") + `]}`,
		"10-one.conflist": gated("one"), "20-two.conflist": gated("two"),
		"30-not.conflist": flannelList, "40-single.conf": bridgeSingle, "50-broken.conflist": "{", "60-same-name.conflist": gated("one"),
	} {
		if err := os.WriteFile(filepath.Join(dir, file), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	networks, err := Gated(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, n := range networks {
		names = append(names, n.Name)
		if len(n.Plugins) != 2 {
			t.Errorf("network %s has %d plugins", n.Name, len(n.Plugins))
		}
	}
	if want := []string{"inner", "one", "two"}; !slices.Equal(names, want) {
		t.Errorf("got %v, want %v", names, want)
	}
	for text, form := range map[string]Form{
		gated("x"): FormList, bridgeSingle: FormSingle, multusInline: FormDelegate, "{": FormList,
	} {
		want := map[string][]string{
			gated("x"): {"bridge", "podgate-cni"}, bridgeSingle: {"bridge"}, multusInline: {"flannel"},
		}[text]
		if got := (File{Form: form}).Plugins([]byte(text)); !slices.Equal(got, want) {
			t.Errorf("plugins of %s are %v", text, got)
		}
	}
}

// A list within the configuration of multus is changed as one by itself is.
func FuzzDelegate(f *testing.F) {
	f.Add([]byte(multusInline))
	f.Add([]byte(multusSingle))
	f.Add([]byte(`{"delegates": [ {"name":"n","cniVersion":"1.0.0","plugins":[ {"type":"a"} ] } , 1 ], "z": 1}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		file := File{Form: FormDelegate}
		had, err := file.Merged(b)
		if err != nil {
			return
		}
		after, err := file.Merge(b, Entry{})
		if err != nil {
			return
		}
		if merged, err := file.Merged(after); err != nil || !merged {
			t.Fatalf("not merged: %q (%v)", after, err)
		}
		removed, err := file.Unmerge(after)
		if err != nil || !had && !bytes.Equal(removed, b) {
			t.Fatalf("removed is not what was (%v)\n%q\n%q", err, b, removed)
		}
	})
}
