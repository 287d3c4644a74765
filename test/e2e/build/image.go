// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package build

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// Registry is the first part of the names of all images. It does not exist:
// images are imported into the runtime.
const Registry = "e2e.podgate.test"

// Names of images, whatever their version.
const (
	PauseImage   = Registry + "/pause:1"
	AgnhostImage = Registry + "/agnhost:1"
	CoreDNSImage = Registry + "/coredns:1"
)

// cyclonusAgnhost is what cyclonus calls its image below a registry.
const cyclonusAgnhost = Registry + "/e2e-test-images/agnhost:2.43"

// registries is what KUBE_TEST_REPO_LIST points to, for images of the
// Kubernetes project's tests.
const registries = "promoterE2eRegistry: " + Registry + "\ngcRegistry: " + Registry + "\n"

// machineTools are this machine's programs that tests call in agnhost beside
// agnhost itself. Debian has them in bash, bind9-dnsutils, busybox-static,
// curl, iproute2, libc-bin and netcat-openbsd.
var machineTools = []string{"bash", "busybox", "curl", "dig", "getent", "ip", "nc", "nslookup"}

// busyboxTools are names for busybox.
var busyboxTools = strings.Fields(`awk cat cut date dd env false grep head hostname id ls mkdir mount ping ping6 ps rm
	sed seq sleep sort stat tail test timeout touch tr true umount uniq wc`)

// imageNames are the images, in the order in which they are built.
func imageNames() []string { return []string{"pause", "coredns", "agnhost"} }

// Registries writes a file for KUBE_TEST_REPO_LIST, which makes the Kubernetes
// project's tests use the images that are here.
func (c *Cache) Registries() (file string, err error) {
	file = filepath.Join(c.dir, "registries.yaml")
	return file, os.WriteFile(file, []byte(registries), 0o644)
}

// images builds the images that are not up to date.
func (c *Cache) images(ctx context.Context) error {
	repositories, err := c.Registries()
	if err != nil {
		return err
	}
	list := exec.CommandContext(ctx, filepath.Join(c.Bin(), "images"))
	list.Env = append(os.Environ(), "KUBE_TEST_REPO_LIST="+repositories)
	out, err := list.Output()
	if err != nil {
		return fmt.Errorf("names of images: %w", err)
	}
	upstream := strings.Fields(string(out))
	if len(upstream) < 2 {
		return fmt.Errorf("names of images: %q", out)
	}
	agnhost, err := c.agnhost(ctx)
	if err != nil {
		return err
	}
	for i, image := range []image{
		{
			tags:       []string{PauseImage, upstream[0]},
			entrypoint: []string{"/pause"},
			files:      map[string]string{"/pause": filepath.Join(c.Bin(), "pause")},
		},
		{
			tags:       []string{CoreDNSImage},
			entrypoint: []string{"/coredns"},
			files:      map[string]string{"/coredns": filepath.Join(c.Bin(), "coredns")},
		},
		{
			tags:       append(upstream[1:], AgnhostImage, cyclonusAgnhost), // one has the tools of all,
			entrypoint: []string{"/agnhost"},
			command:    []string{"pause"},
			files:      agnhost,
			links:      shellLinks(),
			texts: map[string]string{
				"/etc/passwd":        "root:x:0:0:root:/:/bin/sh\n",
				"/etc/group":         "root:x:0:\n",
				"/etc/nsswitch.conf": "hosts: files dns\n",
			},
		},
	} {
		if err := c.image(imageNames()[i], image); err != nil {
			return fmt.Errorf("image of %s: %w", imageNames()[i], err)
		}
	}
	return nil
}

func shellLinks() map[string]string {
	links := map[string]string{"/bin/sh": "bash"}
	for _, tool := range busyboxTools {
		links["/bin/"+tool] = "busybox"
	}
	return links
}

// image is a file system of one layer, made of this machine's files.
type image struct {
	tags                []string
	entrypoint, command []string
	files               map[string]string // path in the image to path here
	texts               map[string]string // path in the image to content
	links               map[string]string
}

// image writes an image, as `docker save` would, unless it is there.
func (c *Cache) image(what string, i image) error {
	layer, err := i.layer()
	if err != nil {
		return err
	}
	sum := sha256.Sum256(layer)
	stamp := fmt.Sprintf("%s %q %q %q", hex.EncodeToString(sum[:]), i.tags, i.entrypoint, i.command)
	stampFile := c.stampFile("image-" + what)
	old, err := os.ReadFile(stampFile)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if _, err := os.Stat(c.imageFile(what)); err == nil && string(old) == stamp {
		return nil
	}
	built, err := i.build(layer)
	if err != nil {
		return err
	}
	refs := map[name.Reference]v1.Image{}
	for _, t := range i.tags {
		tag, err := name.NewTag(t)
		if err != nil {
			return err
		}
		refs[tag] = built
	}
	temp := c.imageFile("." + what)
	if err := tarball.MultiRefWriteToFile(temp, refs); err != nil {
		return err
	}
	if err := os.Rename(temp, c.imageFile(what)); err != nil {
		return err
	}
	c.log.Info("built", "image", what)
	return os.WriteFile(stampFile, []byte(stamp), 0o644)
}

func (i image) build(layer []byte) (v1.Image, error) {
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(layer)), nil })
	if err != nil {
		return nil, err
	}
	built, err := mutate.AppendLayers(empty.Image, l)
	if err != nil {
		return nil, err
	}
	config, err := built.ConfigFile()
	if err != nil {
		return nil, err
	}
	config = config.DeepCopy()
	config.OS, config.Architecture = runtime.GOOS, runtime.GOARCH
	config.Config = v1.Config{Entrypoint: i.entrypoint, Cmd: i.command, Env: []string{"PATH=/bin:/"}}
	return mutate.ConfigFile(built, config)
}

// layer is the file system as a tar archive, the same for the same files.
func (i image) layer() ([]byte, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	made := map[string]bool{}
	var mkdir func(dir string) error
	mkdir = func(dir string) error {
		if dir == "/" || made[dir] {
			return nil
		}
		if err := mkdir(path.Dir(dir)); err != nil {
			return err
		}
		made[dir] = true
		return w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir[1:] + "/", Mode: 0o755})
	}
	write := func(to string, mode int64, content []byte) error {
		if err := mkdir(path.Dir(to)); err != nil {
			return err
		}
		header := tar.Header{Typeflag: tar.TypeReg, Name: to[1:], Mode: mode, Size: int64(len(content))}
		if err := w.WriteHeader(&header); err != nil {
			return err
		}
		_, err := w.Write(content)
		return err
	}
	for _, dir := range []string{"/etc", "/tmp", "/uploads"} {
		if err := mkdir(dir); err != nil {
			return nil, err
		}
	}
	for _, file := range slices.Sorted(maps.Keys(i.texts)) {
		if err := write(file, 0o644, []byte(i.texts[file])); err != nil {
			return nil, err
		}
	}
	for _, to := range slices.Sorted(maps.Keys(i.files)) {
		content, err := os.ReadFile(i.files[to])
		if err != nil {
			return nil, err
		}
		if err := write(to, 0o755, content); err != nil {
			return nil, err
		}
	}
	for _, from := range slices.Sorted(maps.Keys(i.links)) {
		header := tar.Header{Typeflag: tar.TypeSymlink, Name: from[1:], Linkname: i.links[from], Mode: 0o777}
		if err := w.WriteHeader(&header); err != nil {
			return nil, err
		}
	}
	return b.Bytes(), w.Close()
}

// sharedObject is a path in what ldd prints.
var sharedObject = regexp.MustCompile(`/\S+`)

// agnhost are the files of its image: itself, and this machine's tools with the
// shared objects that they need.
func (c *Cache) agnhost(ctx context.Context) (map[string]string, error) {
	files := map[string]string{"/agnhost": filepath.Join(c.Bin(), "agnhost")}
	// What it serves TLS with.
	source, err := c.goCommand(ctx, group{module: "kubernetes"}, "list", "-m", "-f", "{{.Dir}}", kubernetes)
	if err != nil {
		return nil, err
	}
	for _, name := range []string{"localhost.crt", "localhost.key"} {
		files["/"+name] = filepath.Join(strings.TrimSpace(source), "test/images/agnhost/porter", name)
	}
	var missing []string
	for _, tool := range machineTools {
		file, err := exec.LookPath(tool)
		if err != nil {
			missing = append(missing, tool)
			continue
		}
		files["/bin/"+tool] = file
		// It fails for static binaries.
		out, err := exec.CommandContext(ctx, "ldd", file).Output()
		var exit *exec.ExitError
		if err != nil && !errors.As(err, &exit) {
			return nil, err
		}
		for _, object := range sharedObject.FindAllString(string(out), -1) {
			files[object] = object
		}
	}
	if len(missing) > 0 {
		return nil, fmt.Errorf("no %s on this machine; Debian has them in the packages "+
			"bash bind9-dnsutils busybox-static curl iproute2 netcat-openbsd", strings.Join(missing, ", "))
	}
	return files, nil
}
