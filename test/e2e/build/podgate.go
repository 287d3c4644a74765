// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package build

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// PodgateImage is the name of podgate's image, without a tag.
const PodgateImage = Registry + "/podgate"

// Podgate is podgate as it might have been: with some of its source changed.
type Podgate struct {
	// Tag of the image, and the version it says it is.
	Tag string
	// Changes by file of the source tree: what is replaced by what.
	Changes map[string][2]string
}

// Build compiles podgate of the source tree at root with the changes, and
// writes its image to a tarball in dir, whose path it returns.
func (p Podgate) Build(ctx context.Context, root, dir string) (file string, err error) {
	if dir, err = os.MkdirTemp(dir, p.Tag+"-"); err != nil {
		return "", err
	}
	overlay, err := p.overlay(root, dir)
	if err != nil {
		return "", err
	}
	files := map[string]string{}
	for binary, pkg := range map[string]string{"podgate": "./cmd/podgate", "podgate-cni": "./plugin"} {
		out := filepath.Join(dir, binary)
		cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-overlay", overlay,
			"-ldflags", "-s -w -X main.version="+p.Tag, "-o", out, pkg)
		cmd.Dir = root
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			return "", fmt.Errorf("go build %s: %w\n%s", pkg, err, out)
		}
		files["/"+binary] = out
	}
	i := image{entrypoint: []string{"/podgate"}, files: files}
	layer, err := i.layer()
	if err != nil {
		return "", err
	}
	built, err := i.build(layer)
	if err != nil {
		return "", err
	}
	tag, err := name.NewTag(PodgateImage + ":" + p.Tag)
	if err != nil {
		return "", err
	}
	file = filepath.Join(dir, "image.tar")
	return file, tarball.MultiRefWriteToFile(file, map[name.Reference]v1.Image{tag: built})
}

// overlay writes the changed files, and the list of them that go takes.
func (p Podgate) overlay(root, dir string) (string, error) {
	replace := map[string]string{}
	for file, change := range p.Changes {
		path := filepath.Join(root, file)
		b, err := os.ReadFile(path)
		if err != nil {
			return "", err
		}
		if strings.Count(string(b), change[0]) != 1 {
			return "", fmt.Errorf("%s: %q is not in there once", file, change[0])
		}
		changed := filepath.Join(dir, strings.ReplaceAll(file, "/", "_"))
		if err := os.WriteFile(changed, []byte(strings.Replace(string(b), change[0], change[1], 1)), 0o600); err != nil {
			return "", err
		}
		replace[path] = changed
	}
	b, err := json.Marshal(map[string]any{"Replace": replace})
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "overlay.json")
	return path, os.WriteFile(path, b, 0o600)
}
