// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"crypto/sha256"
	"debug/buildinfo"
	"encoding/hex"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	cdx "github.com/CycloneDX/cyclonedx-go"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/google/uuid"
)

// bomType is the media type of a bill of materials.
const bomType types.MediaType = "application/vnd.cyclonedx+json"

// bom says what the image of one platform is made of (CycloneDX 1.6).
type bom struct {
	arch     string
	document []byte
	// image refers to the platform's (OCI image-spec, manifest.md: subject).
	image v1.Image
}

// contents are the programs of a platform, and the modules in them.
type contents struct {
	programs []cdx.Component
	// linked are the references of the modules of each program, in its order.
	linked [][]string
	// modules are all of them, by reference.
	modules map[string]cdx.Component
}

// paths are the modules' paths.
func (c *contents) paths() []string {
	var all []string
	for _, m := range c.modules {
		all = append(all, m.Name)
	}
	slices.Sort(all)
	return all
}

// bom says what the programs say of themselves: the modules that are linked into
// them and the version of Go.
func (r release) bom(arch string, image v1.Image, in *contents, known *licences) (bom, error) {
	subject, err := partial.Descriptor(image)
	if err != nil {
		return bom{}, err
	}
	root := cdx.Component{
		BOMRef:  "podgate-linux-" + arch,
		Type:    cdx.ComponentTypeContainer,
		Name:    "podgate",
		Version: r.version,
	}
	components := slices.Clone(in.programs)
	dependencies := []cdx.Dependency{{Ref: root.BOMRef, Dependencies: &[]string{}}}
	for i, program := range in.programs {
		*dependencies[0].Dependencies = append(*dependencies[0].Dependencies, program.BOMRef)
		dependencies = append(dependencies, cdx.Dependency{Ref: program.BOMRef, Dependencies: &in.linked[i]})
	}
	for _, ref := range slices.Sorted(maps.Keys(in.modules)) {
		m := in.modules[ref]
		m.Licenses = &cdx.Licenses{}
		for _, id := range known.of[m.Name] {
			*m.Licenses = append(*m.Licenses, cdx.LicenseChoice{License: &cdx.License{ID: id}})
		}
		components = append(components, m)
	}

	document := cdx.NewBOM()
	// A name of this document that is the same whenever it is made.
	document.SerialNumber = uuid.NewSHA1(uuid.NameSpaceURL, []byte(subject.Digest.String())).URN()
	document.Metadata = &cdx.Metadata{Timestamp: r.created.Format(time.RFC3339), Component: &root}
	document.Components = &components
	document.Dependencies = &dependencies
	var b bytes.Buffer
	encoder := cdx.NewBOMEncoder(&b, cdx.BOMFileFormatJSON).SetPretty(true)
	if err := encoder.EncodeVersion(document, cdx.SpecVersion1_6); err != nil {
		return bom{}, err
	}

	referrer := mutate.MediaType(empty.Image, types.OCIManifestSchema1)
	referrer = mutate.ConfigMediaType(referrer, bomType)
	referrer, err = mutate.AppendLayers(referrer, static.NewLayer(b.Bytes(), bomType))
	if err != nil {
		return bom{}, err
	}
	referrer = mutate.Subject(referrer, *subject).(v1.Image)
	return bom{arch: arch, document: b.Bytes(), image: referrer}, nil
}

// std is the standard library, as a module.
const std = "std"

// contents reads the programs of a platform.
func (r release) contents(arch string) (*contents, error) {
	c := &contents{modules: map[string]cdx.Component{}}
	for _, name := range programs {
		program, err := os.ReadFile(r.path(arch, name))
		if err != nil {
			return nil, err
		}
		info, err := buildinfo.Read(bytes.NewReader(program))
		if err != nil {
			return nil, fmt.Errorf("%s: %w", r.path(arch, name), err)
		}
		digest := sha256.Sum256(program)
		c.programs = append(c.programs, cdx.Component{
			BOMRef:  name,
			Type:    cdx.ComponentTypeApplication,
			Name:    name,
			Version: r.version,
			Hashes:  &[]cdx.Hash{{Algorithm: cdx.HashAlgoSHA256, Value: hex.EncodeToString(digest[:])}},
		})
		linked := []cdx.Component{module(std, strings.TrimPrefix(info.GoVersion, "go"))}
		for _, m := range info.Deps {
			if m.Replace != nil {
				m = m.Replace
			}
			linked = append(linked, module(m.Path, m.Version))
		}
		var refs []string
		for _, m := range linked {
			c.modules[m.BOMRef] = m
			refs = append(refs, m.BOMRef)
		}
		slices.Sort(refs)
		c.linked = append(c.linked, refs)
	}
	return c, nil
}

// module is a component that scanners know by its package URL
// (https://github.com/package-url/purl-spec, type golang).
func module(path, version string) cdx.Component {
	url := "pkg:golang/" + strings.ToLower(path) + "@" + strings.ReplaceAll(version, "+", "%2B")
	return cdx.Component{
		BOMRef:     url,
		Type:       cdx.ComponentTypeLibrary,
		Name:       path,
		Version:    version,
		PackageURL: url,
	}
}
