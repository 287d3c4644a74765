// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"

	"github.com/google/licensecheck"
)

// ours are the licences of podgate, below the directory of the sources.
var ours = []string{"LICENSE", "bpf/LICENSE.BSD-2-Clause", "bpf/LICENSE.GPL-2.0"}

// licenceFile and noticeFile match the names that licences, and what goes with
// them, have in modules.
var (
	licenceFile = regexp.MustCompile(`(?i)^(licen[cs]e|copying)`)
	noticeFile  = regexp.MustCompile(`(?i)^(notice|patents)`)
)

// sureEnough is how much of a file, in percent, must be known words of licences
// for these to be named as the module's.
const sureEnough = 75

// licences are what comes with the modules of a binary: texts that have to go
// wherever the binary goes, and their SPDX identifiers.
type licences struct {
	files []entry
	// of a module, by its path.
	of map[string][]string
}

// licences reads those of modules by their paths, from where the binaries were
// built: Go has the sources of all of them there.
func (r release) licences(ctx context.Context, modules []string) (*licences, error) {
	all := &licences{of: map[string][]string{}}
	for _, name := range ours {
		text, err := os.ReadFile(filepath.Join(r.source, name))
		if err != nil {
			return nil, err
		}
		all.files = append(all.files, entry{path: "licenses/" + path.Base(name), mode: 0o644, content: text})
	}
	directories, err := r.directories(ctx, modules)
	if err != nil {
		return nil, err
	}
	for _, module := range modules {
		files, err := os.ReadDir(directories[module])
		if err != nil {
			return nil, fmt.Errorf("module %s: %w", module, err)
		}
		for _, f := range files {
			licence := licenceFile.MatchString(f.Name())
			if !f.Type().IsRegular() || !licence && !noticeFile.MatchString(f.Name()) {
				continue
			}
			text, err := os.ReadFile(filepath.Join(directories[module], f.Name()))
			if err != nil {
				return nil, err
			}
			all.files = append(all.files, entry{path: path.Join("licenses", module, f.Name()), mode: 0o644, content: text})
			if found := licensecheck.Scan(text); licence && found.Percent >= sureEnough {
				for _, m := range found.Match {
					all.of[module] = append(all.of[module], m.ID)
				}
			}
		}
		if len(all.of[module]) == 0 {
			return nil, fmt.Errorf("module %s: no known licence in %s", module, directories[module])
		}
		slices.Sort(all.of[module])
		all.of[module] = slices.Compact(all.of[module])
	}
	return all, nil
}

// directories are where the sources of modules are, by path. That of the
// standard library is "std".
func (r release) directories(ctx context.Context, modules []string) (map[string]string, error) {
	run := func(args ...string) ([]byte, error) {
		cmd := exec.CommandContext(ctx, "go", args...)
		cmd.Dir = r.source
		out, err := cmd.Output()
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			err = fmt.Errorf("go %s: %w\n%s", args[0], err, exit.Stderr)
		}
		return out, err
	}
	root, err := run("env", "GOROOT")
	if err != nil {
		return nil, err
	}
	found := map[string]string{std: string(bytes.TrimSpace(root))}
	others := slices.DeleteFunc(slices.Clone(modules), func(m string) bool { return m == std })
	list, err := run(append([]string{"list", "-m", "-json"}, others...)...)
	if err != nil {
		return nil, err
	}
	for decoder := json.NewDecoder(bytes.NewReader(list)); ; {
		var m struct {
			Path, Dir string
			Replace   *struct{ Path string }
		}
		if err := decoder.Decode(&m); errors.Is(err, io.EOF) {
			return found, nil
		} else if err != nil {
			return nil, err
		}
		found[m.Path] = m.Dir
		if m.Replace != nil {
			found[m.Replace.Path] = m.Dir
		}
	}
}
