// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

// Package docs checks that the documentation is about what is there.
package docs

import (
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/containernetworking/cni/libcni"

	"github.com/podgate/podgate/conf"
)

// pages are all that a reader may come to, by path from here.
func pages(t *testing.T) map[string]string {
	t.Helper()
	files, err := filepath.Glob("*.md")
	if err != nil {
		t.Fatal(err)
	}
	texts := map[string]string{}
	for _, f := range append(files, "../README.md", "../CONTRIBUTING.md") {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		texts[f] = string(b)
	}
	return texts
}

func TestLinks(t *testing.T) {
	link := regexp.MustCompile(`\]\(([^)\s]+)\)`)
	heading := regexp.MustCompile(`(?m)^#+ (.+)$`)
	for page, text := range pages(t) {
		for _, m := range link.FindAllStringSubmatch(text, -1) {
			target, fragment, _ := strings.Cut(m[1], "#")
			if strings.Contains(target, "://") {
				continue
			}
			in := text
			if target != "" {
				path := filepath.Join(filepath.Dir(page), target)
				b, err := os.ReadFile(path)
				if _, statErr := os.Stat(path); statErr != nil {
					t.Errorf("%s: link to %s: %v", page, m[1], statErr)
				}
				if fragment != "" && err != nil {
					t.Errorf("%s: link to %s: %v", page, m[1], err)
				}
				in = string(b)
			}
			if fragment == "" {
				continue
			}
			found := slices.ContainsFunc(heading.FindAllStringSubmatch(in, -1), func(h []string) bool {
				return anchor(h[1]) == fragment
			})
			if !found {
				t.Errorf("%s: link to %s: no such heading", page, m[1])
			}
		}
	}
}

// anchor is the name a heading has in a link.
func anchor(heading string) string {
	return strings.ReplaceAll(regexp.MustCompile(`[^a-z0-9 -]`).ReplaceAllString(strings.ToLower(heading), ""), " ", "-")
}

// TestConflists reads every network configuration list in the pages as libcni
// and podgate-cni do.
func TestConflists(t *testing.T) {
	lists := 0
	for page, text := range pages(t) {
		for _, block := range fenced(text, "json") {
			if !strings.Contains(block, `"plugins"`) {
				continue
			}
			lists++
			list, err := libcni.NetworkConfFromBytes([]byte(block))
			if err != nil {
				t.Errorf("%s: %v\n%s", page, err, block)
				continue
			}
			ours := 0
			for _, p := range list.Plugins {
				if p.Network.Type != "podgate-cni" {
					continue
				}
				ours++
				if _, err := conf.Parse(p.Bytes); err != nil {
					t.Errorf("%s: %v", page, err)
				}
			}
			if ours == 0 {
				t.Errorf("%s: a list without podgate-cni\n%s", page, block)
			}
		}
	}
	if lists == 0 {
		t.Error("no lists found")
	}
}

// fenced are the code blocks of a language.
func fenced(text, language string) []string {
	var blocks []string
	for _, m := range regexp.MustCompile("(?s)```"+language+"\n(.*?)```").FindAllStringSubmatch(text, -1) {
		blocks = append(blocks, m[1])
	}
	return blocks
}

// TestKeys compares the tables of configuration.md with what conf reads.
func TestKeys(t *testing.T) {
	text := pages(t)["configuration.md"]
	defaults := regexp.MustCompile("(?m)^\\| `([a-zA-Z]+)` \\| .* \\| `(.*)` \\| [^|]* \\|$")
	for _, m := range defaults.FindAllStringSubmatch(section(text, "podgate-cni"), -1) {
		value := strconv.Quote(m[2])
		if m[2] == "true" || m[2] == "false" {
			value = m[2]
		}
		c, err := conf.Parse([]byte(`{"` + m[1] + `": ` + value + `}`))
		if err != nil {
			t.Errorf("%s: %v", m[1], err)
		} else if !reflect.DeepEqual(c, conf.Defaults()) {
			t.Errorf("%s is not what %s is by default", value, m[1])
		}
	}
	keys := regexp.MustCompile("(?m)^\\| `([a-zA-Z]+)` \\|")
	for heading, types := range map[string][]reflect.Type{
		"podgate-cni": {reflect.TypeFor[conf.Gate](), reflect.TypeFor[conf.Instance](), reflect.TypeFor[conf.Log]()},
		"Capacity":    {reflect.TypeFor[conf.Capacity]()},
	} {
		var got, want []string
		for _, m := range keys.FindAllStringSubmatch(section(text, heading), -1) {
			got = append(got, strings.ToLower(m[1]))
		}
		for _, typ := range types {
			for i := range typ.NumField() {
				want = append(want, strings.ToLower(typ.Field(i).Name))
			}
		}
		slices.Sort(got)
		slices.Sort(want)
		if !slices.Equal(got, want) {
			t.Errorf("%s documents %q, conf has %q", heading, got, want)
		}
	}
}

// section is the text below a heading of the second level.
func section(text, heading string) string {
	_, after, _ := strings.Cut(text, "\n## "+heading+"\n")
	before, _, _ := strings.Cut(after, "\n## ")
	return before
}

// TestFlags compares the flags in the pages with the commands' own help.
func TestFlags(t *testing.T) {
	podgate := filepath.Join(t.TempDir(), "podgate")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", podgate, "../cmd/podgate").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	flag := regexp.MustCompile(`--[a-z][a-z-]*[a-z]`)
	// Lines that call other commands have the flags of those.
	others := regexp.MustCompile(`(?m)^\$ (kubectl|helm) .*$`)
	flags := func(text string) map[string]bool {
		set := map[string]bool{}
		for _, f := range flag.FindAllString(others.ReplaceAllString(text, ""), -1) {
			set[f] = true
		}
		return set
	}
	texts := pages(t)
	shared := section(texts["configuration.md"], "podgate sync") + section(texts["configuration.md"], "Capacity")
	for _, tt := range []struct {
		commands []string
		// text is about these commands alone, and beside is about them too.
		text, beside string
	}{
		{[]string{"sync"}, shared, ""},
		{[]string{"install", "uninstall", "adopt"}, texts["install.md"], shared},
	} {
		known := map[string]bool{"--capacity": true} // "the --capacity-… flags"
		for _, command := range tt.commands {
			out, err := exec.CommandContext(t.Context(), podgate, command, "--help").CombinedOutput()
			if err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			maps.Copy(known, flags(string(out)))
		}
		documented := flags(tt.text + tt.beside)
		for f := range known {
			if !documented[f] && f != "--output" && f != "--help" && f != "--capacity" {
				t.Errorf("podgate %s: %s is not documented", strings.Join(tt.commands, ", "), f)
			}
		}
		for f := range flags(tt.text) {
			if !known[f] {
				t.Errorf("podgate %s: %s is documented and does not exist", strings.Join(tt.commands, ", "), f)
			}
		}
	}
}
