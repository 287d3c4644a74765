// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"archive/tar"
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// release is what an image is made of.
type release struct {
	version, revision string
	// created is the time of everything in the image, so that it is the same
	// whenever it is built (https://reproducible-builds.org/specs/source-date-epoch).
	created time.Time
	// source is the directory of the sources that the binaries are of.
	source string
	// binaries is a directory with one of programs for each platform.
	binaries string
}

// platforms are in the image's index, by the name that GOARCH has for them.
var platforms = []struct {
	arch    string
	machine elf.Machine
}{
	{"amd64", elf.EM_X86_64},
	{"arm64", elf.EM_AARCH64},
}

// programs are in /, as `podgate install --from /` wants them. podgate-ipam is
// a link that the installer makes.
var programs = []string{"podgate", "podgate-cni"}

// annotations are of the image, and its labels (OCI image-spec, annotations.md).
func (r release) annotations() map[string]string {
	all := map[string]string{
		"org.opencontainers.image.title":         "podgate",
		"org.opencontainers.image.description":   "Kubernetes network policy for the network you already have",
		"org.opencontainers.image.source":        "https://github.com/podgate/podgate",
		"org.opencontainers.image.documentation": "https://github.com/podgate/podgate/tree/main/docs",
		"org.opencontainers.image.licenses":      "Apache-2.0 AND (GPL-2.0-only OR BSD-2-Clause)",
		"org.opencontainers.image.created":       r.created.Format(time.RFC3339),
		"org.opencontainers.image.version":       r.version,
	}
	if r.revision != "" {
		all["org.opencontainers.image.revision"] = r.revision
	}
	return all
}

// bundle is an image for all platforms, and what refers to it.
type bundle struct {
	index v1.ImageIndex
	boms  []bom
}

func (r release) bundle(ctx context.Context) (*bundle, error) {
	a := &bundle{index: mutate.IndexMediaType(empty.Index, types.OCIImageIndex)}
	for _, p := range platforms {
		in, err := r.contents(p.arch)
		if err != nil {
			return nil, err
		}
		known, err := r.licences(ctx, in.paths())
		if err != nil {
			return nil, fmt.Errorf("licences: %w", err)
		}
		image, err := r.image(p.arch, p.machine, known.files)
		if err != nil {
			return nil, fmt.Errorf("image for %s: %w", p.arch, err)
		}
		a.index = mutate.AppendManifests(a.index, mutate.IndexAddendum{
			Add:        image,
			Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: p.arch}},
		})
		b, err := r.bom(p.arch, image, in, known)
		if err != nil {
			return nil, fmt.Errorf("bill of materials for %s: %w", p.arch, err)
		}
		a.boms = append(a.boms, b)
	}
	a.index = mutate.Annotations(a.index, r.annotations()).(v1.ImageIndex)
	return a, nil
}

// path of a program here.
func (r release) path(arch, program string) string {
	return filepath.Join(r.binaries, "linux-"+arch, program)
}

// image is that of one platform: a layer with the programs and the files.
func (r release) image(arch string, machine elf.Machine, files []entry) (v1.Image, error) {
	var entries []entry
	for _, p := range programs {
		b, err := os.ReadFile(r.path(arch, p))
		if err != nil {
			return nil, err
		}
		if err := standalone(b, machine); err != nil {
			return nil, fmt.Errorf("%s: %w", r.path(arch, p), err)
		}
		entries = append(entries, entry{path: p, mode: 0o755, content: b})
	}
	layer, err := r.layer(append(entries, files...))
	if err != nil {
		return nil, err
	}
	created := v1.Time{Time: r.created}
	image := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	image, err = mutate.Append(image, mutate.Addendum{
		Layer:     layer,
		MediaType: types.OCILayer,
		History:   v1.History{Created: created, CreatedBy: "make image"},
	})
	if err != nil {
		return nil, err
	}
	config, err := image.ConfigFile()
	if err != nil {
		return nil, err
	}
	config = config.DeepCopy()
	config.OS, config.Architecture, config.Created = "linux", arch, created
	config.Config = v1.Config{
		Entrypoint: []string{"/podgate"},
		Env:        []string{"PATH=/"},
		Labels:     r.annotations(),
	}
	image, err = mutate.ConfigFile(image, config)
	if err != nil {
		return nil, err
	}
	return mutate.Annotations(image, r.annotations()).(v1.Image), nil
}

func (r release) layer(entries []entry) (v1.Layer, error) {
	var b bytes.Buffer
	if err := archive(&b, r.created, entries); err != nil {
		return nil, err
	}
	return tarball.LayerFromOpener(
		func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil },
		tarball.WithCompressedCaching,
		tarball.WithMediaType(types.OCILayer),
	)
}

// standalone returns an error unless a program runs with nothing but a kernel of
// that machine: there is no loader and no library in the image.
func standalone(program []byte, machine elf.Machine) error {
	f, err := elf.NewFile(bytes.NewReader(program))
	if err != nil {
		return err
	}
	if f.Machine != machine {
		return fmt.Errorf("is for %s, not for %s", f.Machine, machine)
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return errors.New("is not static")
		}
	}
	return nil
}

// entry is a file of an archive.
type entry struct {
	path    string
	mode    int64
	content []byte
}

// archive writes entries in their order, directories before what is in them,
// with nothing of this machine.
func archive(w io.Writer, modified time.Time, entries []entry) error {
	t := tar.NewWriter(w)
	made := map[string]bool{".": true}
	var mkdir func(dir string) error
	mkdir = func(dir string) error {
		if made[dir] {
			return nil
		}
		made[dir] = true
		if err := mkdir(path.Dir(dir)); err != nil {
			return err
		}
		return t.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir + "/", Mode: 0o755, ModTime: modified})
	}
	for _, e := range entries {
		if err := mkdir(path.Dir(e.path)); err != nil {
			return err
		}
		err := t.WriteHeader(&tar.Header{Name: e.path, Mode: e.mode, Size: int64(len(e.content)), ModTime: modified})
		if err != nil {
			return err
		}
		if _, err := t.Write(e.content); err != nil {
			return err
		}
	}
	return t.Close()
}
