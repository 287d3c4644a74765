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

// bom reads what the programs say of themselves: the modules that are linked
// into them and the version of Go.
func (r release) bom(arch string, image v1.Image) (bom, error) {
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
	var components []cdx.Component
	modules := map[string]cdx.Component{}
	dependencies := []cdx.Dependency{{Ref: root.BOMRef, Dependencies: &[]string{}}}
	for _, program := range programs {
		component, linked, err := r.program(arch, program)
		if err != nil {
			return bom{}, err
		}
		components = append(components, component)
		*dependencies[0].Dependencies = append(*dependencies[0].Dependencies, component.BOMRef)
		refs := slices.Sorted(maps.Keys(linked))
		dependencies = append(dependencies, cdx.Dependency{Ref: component.BOMRef, Dependencies: &refs})
		maps.Copy(modules, linked)
	}
	for _, ref := range slices.Sorted(maps.Keys(modules)) {
		components = append(components, modules[ref])
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

// program is a binary and the modules in it, by their references.
func (r release) program(arch, name string) (cdx.Component, map[string]cdx.Component, error) {
	content, err := os.ReadFile(r.path(arch, name))
	if err != nil {
		return cdx.Component{}, nil, err
	}
	info, err := buildinfo.Read(bytes.NewReader(content))
	if err != nil {
		return cdx.Component{}, nil, fmt.Errorf("%s: %w", name, err)
	}
	digest := sha256.Sum256(content)
	component := cdx.Component{
		BOMRef:  name,
		Type:    cdx.ComponentTypeApplication,
		Name:    name,
		Version: r.version,
		Hashes:  &[]cdx.Hash{{Algorithm: cdx.HashAlgoSHA256, Value: hex.EncodeToString(digest[:])}},
	}
	modules := map[string]cdx.Component{}
	add := func(path, version string) {
		m := module(path, version)
		modules[m.BOMRef] = m
	}
	add("std", strings.TrimPrefix(info.GoVersion, "go"))
	for _, m := range info.Deps {
		if m.Replace != nil {
			m = m.Replace
		}
		add(m.Path, m.Version)
	}
	return component, modules, nil
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
