// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// write makes the directory an OCI image layout, and puts beside it the same as
// a file to import into a runtime, and the bills of materials as files.
func (a *bundle) write(dir string, tag name.Tag, created time.Time) error {
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	path, err := layout.Write(dir, empty.Index)
	if err != nil {
		return err
	}
	err = path.AppendIndex(a.index, layout.WithAnnotations(map[string]string{
		"org.opencontainers.image.ref.name": tag.TagStr(),
		// What containerd and kind call it, where the other one is a tag only.
		"io.containerd.image.name": tag.Name(),
	}))
	if err != nil {
		return err
	}
	// Importers take everything that the index lists for an image to run. So
	// what refers to the image is not in the file.
	if err := archiveDir(dir+".tar", dir, created); err != nil {
		return err
	}
	for _, b := range a.boms {
		if err := path.AppendImage(b.image); err != nil {
			return err
		}
		file := filepath.Join(filepath.Dir(dir), "podgate-linux-"+b.arch+".cdx.json")
		if err := os.WriteFile(file, b.document, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// archiveDir writes the files of a directory to file.
func archiveDir(file, dir string, modified time.Time) error {
	var entries []entry
	err := fs.WalkDir(os.DirFS(dir), ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		content, err := os.ReadFile(filepath.Join(dir, path))
		entries = append(entries, entry{path: path, mode: 0o644, content: content})
		return err
	})
	if err != nil {
		return err
	}
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := archive(f, modified, entries); err != nil {
		return err
	}
	return f.Close()
}

// push writes the image, and then what refers to it, to a registry.
func (a *bundle) push(tag name.Tag, options ...remote.Option) error {
	if err := remote.WriteIndex(tag, a.index, options...); err != nil {
		return fmt.Errorf("push %s: %w", tag, err)
	}
	for _, b := range a.boms {
		digest, err := b.image.Digest()
		if err != nil {
			return err
		}
		if err := remote.Write(tag.Context().Digest(digest.String()), b.image, options...); err != nil {
			return fmt.Errorf("push the bill of materials of %s: %w", tag, err)
		}
	}
	return nil
}
