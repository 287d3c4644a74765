// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"archive/tar"
	"bytes"
	"debug/buildinfo"
	"errors"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"net/http/httptest"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	cdx "github.com/CycloneDX/cyclonedx-go"
	"github.com/google/go-containerregistry/pkg/crane"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/validate"
)

const version = "v0.0.0-test"

// outputs are files of bin/. The layout and image.tar have the image's name in
// them, which is not the same twice.
var outputs = []string{"podgate-linux-amd64.cdx.json", "podgate-linux-arm64.cdx.json"}

// build copies the sources to a directory of that name, makes the image there
// and pushes it.
func build(t *testing.T, dir, image string) (bin string) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), dir)
	err := fs.WalkDir(os.DirFS("../.."), ".", func(file string, d fs.DirEntry, err error) error {
		to := filepath.Join(dir, file)
		switch {
		case err != nil:
			return err
		case file == "bin", file == ".git":
			return fs.SkipDir
		case d.IsDir():
			return os.MkdirAll(to, 0o755)
		}
		content, err := os.ReadFile(filepath.Join("../..", file))
		if err != nil {
			return err
		}
		return os.WriteFile(to, content, 0o644)
	})
	if err != nil {
		t.Fatal(err)
	}
	run := exec.CommandContext(t.Context(), "make", "image-push",
		"IMAGE="+image, "VERSION="+version, "SOURCE_DATE_EPOCH=1700000000")
	run.Dir = dir
	if out, err := run.CombinedOutput(); err != nil {
		t.Fatalf("make image-push: %v\n%s", err, out)
	}
	return filepath.Join(dir, "bin")
}

func read(t *testing.T, elem ...string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(elem...))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestImage builds the image twice, in two directories and for two registries:
// one that knows the API of referrers, and one that gets a tag instead (OCI
// distribution-spec, "Referrers tag schema").
func TestImage(t *testing.T) {
	images := []string{serve(t, registry.WithReferrersSupport(true)), serve(t)}
	bin, other := build(t, "one", images[0]), build(t, "another/directory", images[1])
	for _, file := range outputs {
		if !bytes.Equal(read(t, bin, file), read(t, other, file)) {
			t.Errorf("two builds of the same sources differ in %s", file)
		}
	}
	dir, err := layout.FromPath(filepath.Join(bin, "image"))
	if err != nil {
		t.Fatal(err)
	}
	all, err := dir.ImageIndex()
	if err != nil {
		t.Fatal(err)
	}
	manifest, err := all.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	index, err := all.ImageIndex(manifest.Manifests[0].Digest)
	if err != nil {
		t.Fatal(err)
	}
	if err := validate.Index(index); err != nil {
		t.Error(err)
	}
	manifest, err = index.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, d := range manifest.Manifests {
		got = append(got, d.Platform.String())
		t.Run(d.Platform.Architecture, func(t *testing.T) {
			image, err := index.Image(d.Digest)
			if err != nil {
				t.Fatal(err)
			}
			testPlatform(t, bin, d.Platform.Architecture, image)
		})
	}
	if want := []string{"linux/amd64", "linux/arm64"}; !slices.Equal(got, want) {
		t.Errorf("platforms %q, want %q", got, want)
	}
	for _, image := range images {
		testPushed(t, image, index)
	}
}

func testPlatform(t *testing.T, bin, arch string, image v1.Image) {
	config, err := image.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	if config.OS != "linux" || config.Architecture != arch || config.Created.Unix() != 1700000000 {
		t.Errorf("config says %s/%s, created %s", config.OS, config.Architecture, config.Created)
	}
	if got := config.Config.Labels["org.opencontainers.image.version"]; got != version {
		t.Errorf("label of the version is %q", got)
	}
	files := extract(t, image)
	// The kernel's side is the same on both: little endian.
	for _, object := range []string{"datapath_bpfel.o", "service_bpfel.o"} {
		if !bytes.Contains(files["podgate"], read(t, "../../bpf", object)) {
			t.Errorf("podgate does not have bpf/%s in it", object)
		}
	}

	var linked []string
	for _, program := range programs {
		info, err := buildinfo.Read(bytes.NewReader(files[program]))
		if err != nil {
			t.Fatalf("%s: %v", program, err)
		}
		for _, s := range info.Settings {
			if s.Key == "GOARCH" && s.Value != arch {
				t.Errorf("%s is for %s", program, s.Value)
			}
		}
		linked = append(linked, "std "+strings.TrimPrefix(info.GoVersion, "go"))
		for _, m := range info.Deps {
			linked = append(linked, m.Path+" "+m.Version)
		}
	}
	slices.Sort(linked)
	linked = slices.Compact(linked)
	document := cdx.NewBOM()
	file := read(t, bin, "podgate-linux-"+arch+".cdx.json")
	if err := cdx.NewBOMDecoder(bytes.NewReader(file), cdx.BOMFileFormatJSON).Decode(document); err != nil {
		t.Fatal(err)
	}
	var listed []string
	for _, c := range *document.Components {
		if c.Type != cdx.ComponentTypeLibrary {
			continue
		}
		listed = append(listed, c.Name+" "+c.Version)
		if c.Licenses == nil || len(*c.Licenses) == 0 {
			t.Errorf("%s has no licence", c.Name)
		}
		if !slices.ContainsFunc(slices.Collect(maps.Keys(files)), func(name string) bool {
			return path.Dir(name) == "licenses/"+c.Name && len(files[name]) > 0
		}) {
			t.Errorf("the licence of %s is not in the image", c.Name)
		}
	}
	slices.Sort(listed)
	if !slices.Equal(listed, linked) {
		t.Errorf("the bill of materials lists %q, linked are %q", listed, linked)
	}
}

// extract reads the files of an image.
func extract(t *testing.T, image v1.Image) map[string][]byte {
	t.Helper()
	stream := mutate.Extract(image)
	defer stream.Close()
	files := map[string][]byte{}
	for r := tar.NewReader(stream); ; {
		header, err := r.Next()
		if errors.Is(err, io.EOF) {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}
		if files[header.Name], err = io.ReadAll(r); err != nil {
			t.Fatal(err)
		}
	}
}

// serve starts a registry, and answers a name for an image in it.
func serve(t *testing.T, options ...registry.Option) (image string) {
	options = append(options, registry.Logger(slog.NewLogLogger(slog.DiscardHandler, slog.LevelInfo)))
	server := httptest.NewServer(registry.New(options...))
	t.Cleanup(server.Close)
	return strings.TrimPrefix(server.URL, "http://") + "/podgate:v1"
}

// testPushed looks at what a registry has as image.
func testPushed(t *testing.T, image string, want v1.ImageIndex) {
	digest, err := crane.Digest(image)
	if err != nil {
		t.Fatal(err)
	}
	if d, err := want.Digest(); err != nil || digest != d.String() {
		t.Errorf("pushed %s, built %s (%v)", digest, d, err)
	}
	ref, err := name.ParseReference(image)
	if err != nil {
		t.Fatal(err)
	}
	manifest, err := want.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range manifest.Manifests {
		referrers, err := remote.Referrers(ref.Context().Digest(d.Digest.String()))
		if err != nil {
			t.Fatal(err)
		}
		m, err := referrers.IndexManifest()
		if err != nil {
			t.Fatal(err)
		}
		if len(m.Manifests) != 1 || m.Manifests[0].ArtifactType != string(bomType) {
			t.Errorf("%s has the referrers %+v", d.Platform, m.Manifests)
		}
	}
}
