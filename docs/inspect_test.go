// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package docs

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"

	"github.com/podgate/podgate/bpf"
	"github.com/podgate/podgate/bpf/policy"
	"github.com/podgate/podgate/pinning"
	"github.com/podgate/podgate/test/need"
	"github.com/podgate/podgate/test/netlab"
)

var update = flag.Bool("update", false, "write into inspect.md what its commands print")

// specs are the collections that the datapath is made of.
func specs(t *testing.T) []*ebpf.CollectionSpec {
	t.Helper()
	var out []*ebpf.CollectionSpec
	for _, load := range []func() (*ebpf.CollectionSpec, error){bpf.LoadDatapath, bpf.LoadService} {
		spec, err := load()
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, spec)
	}
	return out
}

// TestPins compares the maps and programs that inspect.md lists with those of
// the objects.
func TestPins(t *testing.T) {
	want := map[string]struct{}{}
	for _, spec := range specs(t) {
		for name := range spec.Maps {
			if name != bpf.DatapathMapScratches && !strings.HasPrefix(name, ".") {
				want["maps/"+name] = struct{}{}
			}
		}
		for name, p := range spec.Programs {
			if p.SectionName != ".text" && !strings.HasPrefix(p.SectionName, "freplace") {
				want["progs/"+strings.TrimPrefix(name, "podgate_")] = struct{}{}
			}
		}
	}
	var got []string
	for _, m := range regexp.MustCompile("(?m)^\\| `((?:maps|progs)/\\w+)` \\|").FindAllStringSubmatch(pages(t)["inspect.md"], -1) {
		got = append(got, m[1])
	}
	slices.Sort(got)
	if want := slices.Sorted(maps.Keys(want)); !slices.Equal(got, want) {
		t.Errorf("inspect.md lists %q, pinned are %q", got, want)
	}
}

// fields are the names of everything that maps hold.
func fields(t *testing.T) map[string]bool {
	t.Helper()
	out := map[string]bool{}
	var add func(btf.Type)
	add = func(typ btf.Type) {
		switch typ := btf.UnderlyingType(typ).(type) {
		case *btf.Struct:
			for _, m := range typ.Members {
				out[m.Name] = true
				add(m.Type)
			}
		case *btf.Array:
			add(typ.Type)
		}
	}
	for _, spec := range specs(t) {
		for _, m := range spec.Maps {
			for _, typ := range []btf.Type{m.Key, m.Value} {
				if typ != nil {
					add(typ)
				}
			}
		}
	}
	return out
}

// TestFields asks that what inspect.md says of fields is about fields there are.
func TestFields(t *testing.T) {
	known := fields(t)
	for _, name := range []string{
		"key", "value", "values", "formatted", // bpftool's own
		"ifname", "type", "max_entries", // of ip's and its objects
	} {
		known[name] = true
	}
	said := map[string]bool{}
	path := regexp.MustCompile(`\.([a-z_]+)`)
	name := regexp.MustCompile(`"([a-z_]+)":`)
	for _, c := range commands(pages(t)["inspect.md"]) {
		for _, m := range path.FindAllStringSubmatch(c.text, -1) {
			said[m[1]] = true
		}
		for _, m := range name.FindAllStringSubmatch(c.output, -1) {
			said[m[1]] = true
		}
	}
	if len(said) < 20 {
		t.Errorf("inspect.md speaks of the fields %q only", slices.Sorted(maps.Keys(said)))
	}
	for field := range said {
		if !known[field] {
			t.Errorf("inspect.md speaks of %q, which no map has", field)
		}
	}
}

// command is one of a page, with what it prints.
type command struct {
	text, output string
	begin, end   int // of the output in the page
}

// commands are those that a page shows at a prompt of root. A line that ends with
// a backslash goes on.
func commands(page string) []command {
	var out []command
	at, inside, more := 0, false, false
	for line := range strings.Lines(page) {
		start := at
		at += len(line)
		switch {
		case !inside:
			inside = line == "```console\n"
		case line == "```\n":
			inside = false
		case more:
			out[len(out)-1].text += line
			more = strings.HasSuffix(line, "\\\n")
			out[len(out)-1].begin, out[len(out)-1].end = at, at
		case strings.HasPrefix(line, "# "):
			out = append(out, command{text: line[2:], begin: at, end: at})
			more = strings.HasSuffix(line, "\\\n")
		default:
			last := &out[len(out)-1]
			last.output, last.end = page[last.begin:start]+line, at
		}
	}
	return out
}

// TestInspect runs what inspect.md shows, in the world that it is about, and
// compares what comes of it but for the numbers.
func TestInspect(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("network namespaces and bpffs need root")
	}
	need.Tools(t, "bash", "bpftool", "ip", "jq")
	if ok, err := netlab.KernelAtLeast(6, 4); err != nil || !ok {
		t.Skipf("the page has the netfilter links of Linux 6.4: %v", err)
	}
	text := pages(t)["inspect.md"]
	list := commands(text)
	const mark = "\x1e"
	script := []string{"set -eu -o pipefail"}
	node := inspected(t)
	for _, c := range list {
		script = append(script, strings.ReplaceAll(c.text, "/sys/fs/bpf", node.BPFFS), "printf '"+mark+"'")
	}
	out, err := node.Exec(t.Context(), "bash", "-c", strings.Join(script, "\n"))
	got := strings.Split(string(out), mark)
	if err != nil {
		t.Fatalf("%v after\n%s\n%s", err, list[len(got)-1].text, got[len(got)-1])
	}
	written := text
	for i := len(list) - 1; i >= 0; i-- {
		c := list[i]
		if *update {
			written = written[:c.begin] + got[i] + written[c.end:]
		} else if want := anonymous(c.output); want != anonymous(got[i]) {
			t.Errorf("not as in inspect.md, which \"go test ./docs -run TestInspect -update\" writes anew:\n# %s\nprints\n%s\ninspect.md has\n%s", c.text, got[i], c.output)
		}
	}
	if *update {
		if err := os.WriteFile("inspect.md", []byte(written), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// anonymous is output without what is another one each time.
func anonymous(text string) string {
	for _, r := range []struct{ from, to string }{
		{`/proc/\d+/fd/\d+`, "/sys/fs/bpf"},
		{`\b(veth|tag )[0-9a-f]+`, "$1"},
		{`\b[0-9a-f]{64}\b`, "ID"},
		{`\d{4}-\d\d-\d\dT[0-9:+-]+`, "TIME"},
		{`\d+`, "N"},
	} {
		text = regexp.MustCompile(r.from).ReplaceAllString(text, r.to)
	}
	return text
}

// inspected is the node that inspect.md is about: the pods of make demo with its
// policies, a Service, a connection that is open and others that were refused.
func inspected(t *testing.T) *netlab.Node {
	t.Helper()
	ctx, plugins := t.Context(), t.TempDir()
	if err := netlab.Build(ctx, plugins); err != nil {
		t.Fatal(err)
	}
	podgate := filepath.Join(t.TempDir(), "podgate")
	if out, err := exec.CommandContext(ctx, "go", "build", "-o", podgate, "../cmd/podgate").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	node, err := netlab.New(netlab.Options{Plugins: plugins})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := node.Close(); err != nil {
			t.Error(err)
		}
	})
	policies := filepath.Join(node.Dir, "policies")
	if err := os.CopyFS(policies, os.DirFS("../test/demo/manifests")); err != nil {
		t.Fatal(err)
	}
	if out, err := node.Exec(ctx, podgate, "--bpffs", node.BPFFS, "--run-dir", filepath.Join(node.Dir, "run"),
		"sync", "--once", "--policy-dir", policies); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	list := netlab.Conflist{CNIVersion: "1.0.0", Name: "inspect", Plugins: []netlab.Plugin{
		node.Bridge("cni0", "10.88.0.0/24", "fd88::/64"), node.Podgate(),
	}}
	pods := map[string]*netlab.Pod{}
	for _, name := range []string{"shop/web", "shop/api", "shop/db", "ops/probe", "guest/visitor"} {
		namespace, name, _ := strings.Cut(name, "/")
		pod, _, err := node.AddPod(ctx, list, netlab.PodSpec{Namespace: namespace, Name: name, UID: "uid-" + name})
		if err != nil {
			t.Fatal(err)
		}
		pods[name] = pod
		t.Cleanup(func() {
			if err := node.DelPod(context.Background(), pod); err != nil {
				t.Error(err)
			}
		})
	}
	serve(t, node)
	converse(t, pods)
	return node
}

// serve makes the Service shop/db known, as the daemon does.
func serve(t *testing.T, node *netlab.Node) {
	t.Helper()
	err := node.Do(func() error {
		state, err := pinning.Open(t.Context(), pinning.Options{Layout: pinning.Layout{BPFFS: node.BPFFS}})
		if err != nil {
			return err
		}
		return errors.Join(state.SetServices(t.Context(), []pinning.Service{{
			Namespace: "shop", Name: "db", PortName: "sql", Protocol: policy.TCP,
			Frontends: []netip.AddrPort{netip.MustParseAddrPort("10.96.0.10:5432")},
			Backends:  []netip.AddrPort{netip.MustParseAddrPort("10.88.0.4:8080")},
		}}), state.Close())
	})
	if err != nil {
		t.Fatal(err)
	}
}

// converse opens a connection from api to db, which stays, and lets visitor try.
func converse(t *testing.T, pods map[string]*netlab.Pod) {
	t.Helper()
	const address = "10.88.0.4:8080"
	err := pods["db"].Do(func() error {
		l, err := net.Listen("tcp", address)
		if err != nil {
			return err
		}
		t.Cleanup(func() { l.Close() })
		go func() {
			c, err := l.Accept()
			if err != nil {
				return
			}
			defer c.Close()
			_, _ = io.Copy(c, c) // ends with the client
		}()
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	err = pods["api"].Do(func() error {
		c, err := net.DialTimeout("tcp", address, 5*time.Second)
		if err != nil {
			return err
		}
		t.Cleanup(func() { c.Close() })
		if _, err := fmt.Fprint(c, "hello"); err != nil {
			return err
		}
		_, err = io.ReadFull(c, make([]byte, 5))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	err = pods["probe"].Do(func() error {
		c, err := net.DialTimeout("tcp", address, 300*time.Millisecond)
		if err == nil {
			c.Close()
		}
		return err
	})
	if err == nil {
		t.Fatal("ops/probe reaches shop/db, which policy denies")
	}
}
