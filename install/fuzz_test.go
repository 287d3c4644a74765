// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package install

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"github.com/podgate/podgate/install/conflist"
)

// Files of the cache are the runtime's: what is changed in them is podgate's
// entry and nothing else.
func FuzzWithoutEntry(f *testing.F) {
	list, err := conflist.Merge([]byte(bridgeList), conflist.Entry{})
	if err != nil {
		f.Fatal(err)
	}
	f.Add([]byte(attached(string(list))))
	f.Add([]byte(attached(bridgeList)))
	f.Add([]byte(`{"kind":"cniCacheV1","config":"e30="}`))
	f.Add(bytes.Replace([]byte(attached(string(list))), []byte(`"config"`), []byte(`"kind":"cniCacheV1","zCONFIG":1,"Config"`), 1))
	f.Fuzz(func(t *testing.T, b []byte) {
		changed, _ := withoutEntry(b)
		if changed == nil {
			return
		}
		var before, after map[string]json.RawMessage
		if err := json.Unmarshal(b, &before); err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(changed, &after); err != nil {
			t.Fatal(err)
		}
		var a attachment
		if err := json.Unmarshal(changed, &a); err != nil {
			t.Fatal(err)
		}
		if merged, err := conflist.Merged(a.Config); err != nil || merged {
			t.Fatalf("podgate is still there: %s (%v)", a.Config, err)
		}
		delete(before, "config")
		delete(after, "config")
		if len(before) != len(after) {
			t.Fatalf("%s became %s", b, changed)
		}
		for key, value := range before {
			var x, y bytes.Buffer
			if json.Compact(&x, value) != nil || json.Compact(&y, after[key]) != nil {
				t.Fatalf("%s: %s became %s", key, value, after[key])
			}
		}
	})
}

// A log may be cut off anywhere, and somebody may have been at it.
func FuzzReadLog(f *testing.F) {
	f.Add([]byte(`{"time":"2026-11-23T12:00:00Z","did":"merge","path":"/x","form":"list","undo":"u"}` + "\n{"))
	f.Add([]byte("\n\n{}\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		dir := t.TempDir()
		path := filepath.Join(dir, logName)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		l, err := readLog(dir)
		if err != nil {
			return
		}
		n := len(l.records)
		if err := l.add(Record{Did: KindDir, Path: "/y", Undo: "u"}); err != nil {
			t.Fatal(err)
		}
		again, err := readLog(dir)
		if err != nil || len(again.records) != n+1 || again.records[n].Path != "/y" {
			t.Fatalf("after a record was added to %q: %+v (%v)", b, again, err)
		}
	})
}
