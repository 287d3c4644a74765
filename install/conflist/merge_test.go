// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package conflist

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containernetworking/cni/libcni"

	"github.com/podgate/podgate/conf"
)

var update = flag.Bool("update", false, "write the golden files of what is merged")

// Lists of main plugins as these write them, with podgate and without it again.
func TestGolden(t *testing.T) {
	files, err := filepath.Glob("testdata/*.conf*")
	if err != nil {
		t.Fatal(err)
	}
	if len(files) < 12 {
		t.Fatalf("only %v", files)
	}
	for _, path := range files {
		t.Run(filepath.Base(path), func(t *testing.T) {
			f, err := Load(path)
			if err != nil {
				t.Fatal(err)
			}
			before := mustRead(t, path)
			after, err := f.Merge(before, Entry{})
			if err != nil {
				t.Fatal(err)
			}
			golden := filepath.Join("testdata", "merged", filepath.Base(path))
			if *update {
				if err := os.WriteFile(golden, after, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if want := mustRead(t, golden); !bytes.Equal(after, want) {
				t.Errorf("merged is\n%s\nwant\n%s", after, want)
			}
			removed, err := f.Unmerge(after)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(removed, before) {
				t.Errorf("removed is\n%s\nbefore it was\n%s", removed, before)
			}
			if again, err := f.Merge(after, Entry{}); err != nil || !bytes.Equal(again, after) {
				t.Errorf("merged again is\n%s (%v)", again, err)
			}
			for list, want := range map[string]bool{string(before): false, string(after): true} {
				if merged, err := f.Merged([]byte(list)); err != nil || merged != want {
					t.Errorf("Merged is %v (%v), want %v\n%s", merged, err, want, list)
				}
			}
		})
	}
}

func mustRead(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// An entry that is there keeps its place, and its writing when it says the same.
func TestMergeUpdates(t *testing.T) {
	for name, test := range map[string]struct {
		before, options, after string
	}{
		"says the same": {
			`{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"bridge"},{ "mode" : "open", "type":"podgate-cni" },{"type":"portmap"}]}`,
			`{"mode":"open"}`,
			`{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"bridge"},{ "mode" : "open", "type":"podgate-cni" },{"type":"portmap"}]}`,
		},
		"other options": {
			`{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"bridge"},{"type":"podgate-cni","mode":"open"},{"type":"portmap"}]}`,
			`{"mode":"closed", "capacity": {"flows": 1024}}`,
			`{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"bridge"},{"type":"podgate-cni","mode":"closed","capacity":{"flows":1024}},{"type":"portmap"}]}`,
		},
		"no options any more": {
			`{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"bridge"}, { "type": "podgate-cni", "mode": "open" }]}`,
			``,
			`{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"bridge"}, { "type": "podgate-cni" }]}`,
		},
		"a capability that a neighbour has by now": {
			`{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"bridge"},{"type":"tuning","capabilities":{"mac":true,"x":true}},{"type":"podgate-cni"}]}`,
			``,
			`{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"bridge"},{"type":"tuning","capabilities":{"mac":true,"x":true}},` +
				`{"type":"podgate-cni","capabilities":{"mac":true}}]}`,
		},
		"of two plugins keys the last counts": {
			`{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"bridge"}],"plugins":[{"type":"ptp"}]}`,
			``,
			`{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"bridge"}],"plugins":[{"type":"ptp"},{"type":"podgate-cni"}]}`,
		},
		"a key like ours deeper down": {
			`{"cniVersion":"1.0.0","name":"n","x":{"plugins":[]},"plugins":[{"type":"bridge","plugins":[1]}]}`,
			``,
			`{"cniVersion":"1.0.0","name":"n","x":{"plugins":[]},"plugins":[{"type":"bridge","plugins":[1]},{"type":"podgate-cni"}]}`,
		},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := Merge([]byte(test.before), Entry{Options: json.RawMessage(test.options)})
			if err != nil {
				t.Fatal(err)
			}
			if string(got) != test.after {
				t.Errorf("got\n%s\nwant\n%s", got, test.after)
			}
		})
	}
}

// Plugins in a folder of their own are neighbours too.
func TestMergeBeside(t *testing.T) {
	beside, err := libcni.NetworkPluginConfFromBytes([]byte(`{"type":"bandwidth","capabilities":{"bandwidth":true}}`))
	if err != nil {
		t.Fatal(err)
	}
	got, err := Merge([]byte(`{"cniVersion":"1.1.0","name":"n","plugins":[{"type":"bridge"}]}`),
		Entry{Beside: []*libcni.PluginConfig{beside}})
	want := `{"cniVersion":"1.1.0","name":"n","plugins":[{"type":"bridge"},{"type":"podgate-cni","capabilities":{"bandwidth":true}}]}`
	if err != nil || string(got) != want {
		t.Errorf("got %s (%v)", got, err)
	}
}

func TestMergeFaults(t *testing.T) {
	list := func(version string) string {
		return `{"cniVersion":"` + version + `","name":"n","plugins":[{"type":"bridge"}]}`
	}
	for name, test := range map[string]struct {
		list, options string
		want          error
		says          string
	}{
		"no JSON":            {`{`, ``, ErrList, "unexpected end"},
		"two documents":      {list("1.0.0") + `{}`, ``, ErrList, "after top-level value"},
		"a single plugin":    {`{"cniVersion":"1.0.0","type":"bridge"}`, ``, ErrList, "no name"},
		"plugins no array":   {`{"cniVersion":"1.0.0","name":"n","plugins":{}}`, ``, ErrList, "plugins"},
		"plugin of no type":  {`{"cniVersion":"1.0.0","name":"n","plugins":[{}]}`, ``, ErrList, "type"},
		"no version":         {`{"name":"n","plugins":[{"type":"bridge"}]}`, ``, ErrVersion, "0.1.0"},
		"version 0.2.0":      {list("0.2.0"), ``, ErrVersion, "0.2.0; want 0.3.0"},
		"version to come":    {list("9.0.0"), ``, ErrVersion, "9.0.0"},
		"no version at all":  {list("soon"), ``, ErrVersion, "soon"},
		"plugins elsewhere":  {`{"cniVersion":"1.1.0","name":"n"}`, ``, ErrNoPlugins, ""},
		"nobody but podgate": {`{"cniVersion":"1.1.0","name":"n","plugins":[{"type":"podgate-cni"}]}`, ``, ErrNoPlugins, ""},
		"twice": {
			`{"cniVersion":"1.1.0","name":"n","plugins":[{"type":"podgate-cni"},{"type":"x"},{"type":"podgate-cni"}]}`, ``, ErrTwice, "[0 2]",
		},
		"unknown option":        {list("1.0.0"), `{"moed":"open"}`, conf.ErrInvalid, "moed"},
		"key that is no option": {list("1.0.0"), `{"type":"x"}`, conf.ErrInvalid, "type"},
		"options no object":     {list("1.0.0"), `[]`, conf.ErrDecode, ""},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Merge([]byte(test.list), Entry{Options: json.RawMessage(test.options)})
			if !errors.Is(err, test.want) || !strings.Contains(err.Error(), test.says) {
				t.Errorf("got %v, want %v saying %q", err, test.want, test.says)
			}
		})
	}
}

// What people chained by hand is found wherever it is.
func TestUnmerge(t *testing.T) {
	for before, want := range map[string]string{
		`{"name":"n","plugins":[ {"type":"podgate-cni"} , {"type":"x"} ]}`:                          `{"name":"n","plugins":[ {"type":"x"} ]}`,
		`{"name":"n","plugins":[{"type":"a"} , {"type":"podgate-cni"} , {"type":"x"} ]}`:            `{"name":"n","plugins":[{"type":"a"} , {"type":"x"} ]}`,
		`{"name":"n","plugins":[{"type":"podgate-cni"},{"type":"podgate-cni"}, {"type":"x"}]}`:      `{"name":"n","plugins":[{"type":"x"}]}`,
		`{"name":"n","plugins":[{"type":"a"},{"type":"podgate-cni"},{"type":"podgate-cni"}]}`:       `{"name":"n","plugins":[{"type":"a"}]}`,
		`{"name":"n","plugins":[{"type":"a"},{"type":"b","x":[{"type":"podgate-cni"}]}], "y":null}`: `{"name":"n","plugins":[{"type":"a"},{"type":"b","x":[{"type":"podgate-cni"}]}], "y":null}`,
	} {
		if got, err := Unmerge([]byte(before)); err != nil || string(got) != want {
			t.Errorf("%s\ngot  %s (%v)\nwant %s", before, got, err, want)
		}
	}
	if _, err := Unmerge([]byte(`{"name":"n","plugins":[{"type":"podgate-cni"}]}`)); !errors.Is(err, ErrNoPlugins) {
		t.Errorf("podgate alone: %v, want ErrNoPlugins", err)
	}
}

func FuzzMerge(f *testing.F) {
	files, err := filepath.Glob("testdata/*.conf*")
	if err != nil {
		f.Fatal(err)
	}
	for _, path := range files {
		b, err := os.ReadFile(path)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b, []byte(`{"mode":"open"}`))
	}
	f.Add([]byte(`{"name":"n","cniVersion":"1.0.0","plugins":[ {"type":"podgate-cni"} , {"Type":"x"} ]}`), []byte(nil))
	f.Fuzz(func(t *testing.T, list, options []byte) {
		had, err := Merged(list)
		if err != nil {
			if !errors.Is(err, ErrList) {
				t.Fatal(err)
			}
			return
		}
		after, err := Merge(list, Entry{Options: options})
		if err != nil {
			return
		}
		again, err := Merge(after, Entry{Options: options})
		if err != nil || !bytes.Equal(again, after) {
			t.Fatalf("merged again: %v\n%q\n%q", err, after, again)
		}
		others, ours := split(t, after)
		if len(ours) != 1 {
			t.Fatalf("podgate is there %d times: %q", len(ours), after)
		}
		if was, _ := split(t, list); !slices.Equal(was, others) {
			t.Fatalf("the others were %q and are %q", was, others)
		}
		removed, err := Unmerge(after)
		if err != nil {
			t.Fatal(err)
		}
		if !had && !bytes.Equal(removed, list) {
			t.Fatalf("removed is not what was\n%q\n%q", list, removed)
		}
		if merged, err := Merged(removed); err != nil || merged {
			t.Fatalf("removed and still there: %q (%v)", removed, err)
		}
	})
}

// split gives the plugins of a list as libcni reads them: the others, and ours.
func split(t *testing.T, b []byte) (others, ours []string) {
	t.Helper()
	list, err := libcni.NetworkConfFromBytes(b)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range list.Plugins {
		if p.Network.Type != Type {
			others = append(others, string(p.Bytes))
			continue
		}
		ours = append(ours, string(p.Bytes))
		if _, err := conf.Parse(p.Bytes); err != nil {
			t.Errorf("podgate-cni refuses %s: %v", p.Bytes, err)
		}
	}
	return others, ours
}
