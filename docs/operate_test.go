// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package docs

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/podgate/podgate/bpf/flow"
)

// sources are the parsed files of our packages, without tests.
func sources(t *testing.T) map[string]*ast.File {
	t.Helper()
	files := map[string]*ast.File{}
	for _, dir := range []string{"bpf", "cmd", "conf", "install", "ipam-hooks", "observe", "pinning", "plugin", "syncd"} {
		err := filepath.WalkDir(filepath.Join("..", dir), func(path string, _ fs.DirEntry, err error) error {
			if err != nil || filepath.Ext(path) != ".go" || strings.HasSuffix(path, "_test.go") {
				return err
			}
			f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
			files[path] = f
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return files
}

// text is the value of a string literal, or of what an expression begins with.
func text(e ast.Expr) (string, bool) {
	if sum, ok := e.(*ast.BinaryExpr); ok {
		return text(sum.X)
	}
	literal, ok := e.(*ast.BasicLit)
	if !ok || literal.Kind != token.STRING {
		return "", false
	}
	s, err := strconv.Unquote(literal.Value)
	return s, err == nil
}

// column is the first cell of every row of the tables in a section, one entry
// for each text in backquotes.
func column(section string) []string {
	var cells []string
	for _, row := range regexp.MustCompile("(?m)^\\| (`[^|]*) \\|").FindAllStringSubmatch(section, -1) {
		for _, m := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(row[1], -1) {
			cells = append(cells, m[1])
		}
	}
	slices.Sort(cells)
	return cells
}

// TestErrors compares the table of errors with the sentinels of all packages.
func TestErrors(t *testing.T) {
	var want []string
	for path, f := range sources(t) {
		for _, decl := range f.Decls {
			vars, ok := decl.(*ast.GenDecl)
			if !ok || vars.Tok != token.VAR {
				continue
			}
			for _, spec := range vars.Specs {
				value := spec.(*ast.ValueSpec)
				if len(value.Values) != 1 || !strings.HasPrefix(strings.ToLower(value.Names[0].Name), "err") {
					continue
				}
				call, ok := value.Values[0].(*ast.CallExpr)
				if !ok || len(call.Args) != 1 {
					t.Errorf("%s: %s is no errors.New", path, value.Names[0])
					continue
				}
				message, ok := text(call.Args[0])
				if !ok {
					t.Errorf("%s: %s has no text of its own", path, value.Names[0])
				}
				if value.Names[0].Name == "errProblem" {
					continue // an exit code: what it is about has been printed
				}
				want = append(want, message)
			}
		}
	}
	slices.Sort(want)
	want = slices.Compact(want) // pinning's and install's locks may say the same
	if got := column(section(pages(t)["operate.md"], "Errors")); !slices.Equal(got, want) {
		t.Errorf("operate.md has the errors\n%q\nthere are\n%q", got, want)
	}
}

// TestProblems compares the table of problems with the subjects that the daemon
// and `podgate status` name. Files and objects of the cluster are subjects of
// their own.
func TestProblems(t *testing.T) {
	want := []string{"API server …", "NetworkPolicy …", "Pod …", "Namespace …"}
	add := func(e ast.Expr) {
		s, ok := text(e)
		if !ok {
			return
		}
		if strings.HasSuffix(s, " ") {
			s += "…"
		}
		want = append(want, s)
	}
	for path, f := range sources(t) {
		if !strings.HasPrefix(path, "../syncd") && !strings.HasPrefix(path, "../cmd") {
			continue
		}
		ast.Inspect(f, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.KeyValueExpr:
				if key, ok := n.Key.(*ast.Ident); ok && key.Name == "Subject" {
					add(n.Value)
				}
			case *ast.CallExpr:
				method, ok := n.Fun.(*ast.SelectorExpr)
				switch {
				case !ok:
				case method.Sel.Name == "problem" && len(n.Args) == 2:
					add(n.Args[0])
				case method.Sel.Name == "set" && len(n.Args) == 3:
					add(n.Args[1])
				}
			}
			return true
		})
	}
	slices.Sort(want)
	want = slices.Compact(want)
	if got := column(section(pages(t)["operate.md"], "Standing problems")); !slices.Equal(got, want) {
		t.Errorf("operate.md has the subjects\n%q\nthere are\n%q", got, want)
	}
}

// TestReasons compares the table of reasons with those of flows.
func TestReasons(t *testing.T) {
	var want []string
	for r := flow.Reason(0); ; r++ {
		if strings.HasPrefix(r.String(), "reason-") {
			break
		}
		want = append(want, r.String())
	}
	slices.Sort(want)
	_, text, _ := strings.Cut(section(pages(t)["operate.md"], "Something does not get through"), "### Reasons")
	if got := column(text); !slices.Equal(got, want) {
		t.Errorf("operate.md has the reasons\n%q\nthere are\n%q", got, want)
	}
}

// TestCodes compares the table of CNI error codes with the plugin's.
func TestCodes(t *testing.T) {
	var want []string
	for _, decl := range sources(t)["../plugin/errors.go"].Decls {
		consts, ok := decl.(*ast.GenDecl)
		if !ok || consts.Tok != token.CONST {
			continue
		}
		for i := range consts.Specs { // 100 + iota
			want = append(want, strconv.Itoa(100+i))
		}
	}
	var got []string
	for _, m := range regexp.MustCompile(`(?m)^\| (\d+) \|`).FindAllStringSubmatch(section(pages(t)["operate.md"], "Errors"), -1) {
		got = append(got, m[1])
	}
	if len(want) == 0 || !slices.Equal(got, want) {
		t.Errorf("operate.md has the codes %q, the plugin %q", got, want)
	}
}

// TestMetrics looks for metrics that are named and not listed.
func TestMetrics(t *testing.T) {
	all := pages(t)
	listed := section(all["configuration.md"], "podgate sync")
	named := regexp.MustCompile(`podgate_[a-z_]+`)
	for _, name := range named.FindAllString(all["operate.md"], -1) {
		if !strings.Contains(listed, "`"+name+"`") {
			t.Errorf("operate.md names %s, configuration.md does not list it", name)
		}
	}
}
