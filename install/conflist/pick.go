// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package conflist

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containernetworking/cni/libcni"
)

// Reasons why there is nothing to merge into.
var (
	// ErrNone: no configuration in the directory that a runtime would load.
	ErrNone = errors.New("no CNI configuration")
	// ErrDelegate: multus is in the way, and what it delegates to cannot be
	// changed in a file.
	ErrDelegate = errors.New("multus delegates to what is in no file")
)

// Form is how a file holds its network.
type Form uint8

// The forms there are.
const (
	// FormList is a network configuration list.
	FormList Form = iota
	// FormSingle is one plugin, of the time before there were lists. It
	// becomes a list in a file beside it.
	FormSingle
	// FormDelegate is a list within the configuration of multus.
	FormDelegate
)

func (f Form) String() string {
	switch f {
	case FormSingle:
		return "single"
	case FormDelegate:
		return "delegate"
	default:
		return "list"
	}
}

// MarshalText gives the name of the form.
func (f Form) MarshalText() ([]byte, error) { return []byte(f.String()), nil }

// UnmarshalText reads the name of a form.
func (f *Form) UnmarshalText(text []byte) error {
	for _, known := range []Form{FormList, FormSingle, FormDelegate} {
		if known.String() == string(text) {
			*f = known
			return nil
		}
	}
	return fmt.Errorf("form %q is not one of list, single, delegate", text)
}

// File is a network configuration on disk.
type File struct {
	Path string
	Form Form
	// Network is its name.
	Network string
	// Beside are plugins of the network in a folder beside the file.
	Beside []*libcni.PluginConfig
	// Skipped are files that a runtime would have taken before this one, if
	// they could be loaded. containerd takes no file at all then.
	Skipped []error
}

// Pick finds the file of dir that runtimes take: the first that can be loaded,
// by name, of *.conf, *.conflist and *.json. When that is of multus it is the
// file that multus delegates a pod's first interface to. It fails with
// [ErrNone] or [ErrDelegate].
func Pick(dir string) (File, error) { return pick(dir, false) }

// pick passes over multus when multus has sent it.
func pick(dir string, delegated bool) (File, error) {
	files, err := libcni.ConfFiles(dir, []string{".conf", ".conflist", ".json"})
	if err != nil {
		return File{}, fmt.Errorf("read %s: %w", dir, err)
	}
	slices.Sort(files)
	var skipped []error
	for _, path := range files {
		f, err := load(path, delegated)
		if errors.Is(err, ErrDelegate) {
			return File{}, err
		}
		if err != nil {
			skipped = append(skipped, err)
			continue
		}
		f.Skipped = append(skipped, f.Skipped...)
		return f, nil
	}
	return File{Skipped: skipped}, fmt.Errorf("%w in %s", errors.Join(append([]error{ErrNone}, skipped...)...), dir)
}

// Load reads the file at path, or finds the one that it, being of multus,
// delegates to. It fails with [ErrList], [ErrDelegate] or the error of the file
// system.
func Load(path string) (File, error) { return load(path, false) }

func load(path string, delegated bool) (File, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return File{}, err
	}
	if filepath.Ext(path) != ".conflist" {
		return loadSingle(path, b, delegated)
	}
	list, err := libcni.NetworkConfFromBytes(b)
	if err != nil {
		return File{}, fmt.Errorf("%s: %w: %w", path, ErrList, err)
	}
	f := File{Path: path, Network: list.Name}
	if !list.LoadOnlyInlinedPlugins {
		if f.Beside, err = libcni.NetworkPluginConfsFromFiles(filepath.Dir(path), list.Name); err != nil {
			return File{}, fmt.Errorf("%s: %w: %w", path, ErrList, err)
		}
	}
	if len(list.Plugins)+len(f.Beside) == 0 {
		return File{}, fmt.Errorf("%s: %w: %w", path, ErrList, ErrNoPlugins)
	}
	if len(list.Plugins) > 0 && list.Plugins[0].Network.Type == multusType {
		return follow(path, list.Plugins[0].Bytes, delegated)
	}
	return f, nil
}

func loadSingle(path string, b []byte, delegated bool) (File, error) {
	plugin, err := libcni.NetworkPluginConfFromBytes(b)
	if err != nil {
		return File{}, fmt.Errorf("%s: %w: %w", path, ErrList, err)
	}
	if plugin.Network.Type == multusType {
		return follow(path, b, delegated)
	}
	return File{Path: path, Form: FormSingle, Network: plugin.Network.Name}, nil
}

// Merge is [Merge] for the bytes of the file, whatever its form. Those of
// [FormSingle] come back as a list.
func (f File) Merge(b []byte, e Entry) ([]byte, error) {
	e.Beside = f.Beside
	switch f.Form {
	case FormSingle:
		list, err := FromSingle(b)
		if err != nil {
			return nil, err
		}
		return Merge(list, e)
	case FormDelegate:
		return inDelegate(b, func(list []byte) ([]byte, error) { return Merge(list, e) })
	default:
		return Merge(b, e)
	}
}

// Unmerge is [Unmerge] for the bytes of a file of [FormList] or [FormDelegate].
func (f File) Unmerge(b []byte) ([]byte, error) {
	if f.Form == FormDelegate {
		return inDelegate(b, Unmerge)
	}
	return Unmerge(b)
}

// Merged is [Merged] for the bytes of the file. One plugin alone is never
// podgate's.
func (f File) Merged(b []byte) (merged bool, err error) {
	switch f.Form {
	case FormSingle:
		return false, nil
	case FormDelegate:
		_, err = inDelegate(b, func(list []byte) ([]byte, error) {
			merged, err = Merged(list)
			return list, err
		})
		return merged, err
	default:
		return Merged(b)
	}
}

// Plugins are the types of the plugins in the bytes of the file, as far as they
// can be read.
func (f File) Plugins(b []byte) (types []string) {
	read := func(list []byte) ([]byte, error) {
		c, err := read(list)
		if err == nil {
			for _, p := range c.Plugins {
				types = append(types, p.Network.Type)
			}
		}
		return list, err
	}
	switch f.Form {
	case FormSingle:
		if plugin, err := libcni.NetworkPluginConfFromBytes(b); err == nil {
			types = []string{plugin.Network.Type}
		}
	case FormDelegate:
		_, _ = inDelegate(b, read)
	default:
		_, _ = read(b)
	}
	return types
}

// FromSingle makes a list of the configuration of one plugin, with the name and
// version of that. It fails with [ErrList].
func FromSingle(b []byte) ([]byte, error) {
	plugin, err := libcni.NetworkPluginConfFromBytes(b)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrList, err)
	}
	if plugin.Network.Name == "" {
		return nil, fmt.Errorf("%w: no name", ErrList)
	}
	// In the order in which lists are written.
	list := struct {
		CNIVersion string            `json:"cniVersion,omitempty"`
		Name       string            `json:"name"`
		Plugins    []json.RawMessage `json:"plugins"`
	}{plugin.Network.CNIVersion, plugin.Network.Name, []json.RawMessage{b}}
	var out bytes.Buffer
	e := json.NewEncoder(&out)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	if err := e.Encode(list); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrList, err)
	}
	return out.Bytes(), nil
}

const (
	multusType = "multus"
	// multusDir is where multus looks for networks by name.
	multusDir = "/etc/cni/multus/net.d"
)

// follow finds what multus delegates a pod's first interface to, from its own
// configuration (its docs/configuration.md: clusterNetwork counts before
// delegates).
func follow(path string, b []byte, delegated bool) (File, error) {
	if delegated {
		return File{}, fmt.Errorf("%s: %w: multus again", path, ErrList)
	}
	var multus struct {
		ClusterNetwork string `json:"clusterNetwork"`
		ConfDir        string `json:"confDir"`
		Delegates      []struct {
			Name    string `json:"name"`
			Plugins []any  `json:"plugins"`
		} `json:"delegates"`
	}
	if err := json.Unmarshal(b, &multus); err != nil {
		return File{}, fmt.Errorf("%s: %w: %w", path, ErrList, err)
	}
	if name := multus.ClusterNetwork; name != "" {
		if multus.ConfDir == "" {
			multus.ConfDir = multusDir
		}
		f, err := clusterNetwork(filepath.Dir(path), multus.ConfDir, name)
		if err != nil {
			return File{}, fmt.Errorf("%s: clusterNetwork %q: %w", path, name, err)
		}
		return f, nil
	}
	if len(multus.Delegates) == 0 {
		return File{}, fmt.Errorf("%s: %w: neither clusterNetwork nor delegates", path, ErrDelegate)
	}
	if filepath.Ext(path) == ".conflist" || len(multus.Delegates[0].Plugins) == 0 {
		return File{}, fmt.Errorf("%s: %w: its first delegate is one plugin and no list; let clusterNetwork name a file with a list",
			path, ErrDelegate)
	}
	return File{Path: path, Form: FormDelegate, Network: multus.Delegates[0].Name}, nil
}

// clusterNetwork resolves what multus is told: a file, a directory, or the name
// of a network in confDir. Paths may be those of multus' container, which sees
// dir elsewhere.
func clusterNetwork(dir, confDir, name string) (File, error) {
	for _, path := range []string{name, filepath.Join(dir, filepath.Base(name))} {
		if !filepath.IsAbs(name) {
			break
		}
		info, err := os.Stat(path)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			continue
		case err != nil:
			return File{}, err
		case info.IsDir():
			return pick(path, true)
		}
		return load(path, true)
	}
	files, err := libcni.ConfFiles(confDir, []string{".conf", ".conflist", ".json"})
	if err != nil {
		return File{}, err
	}
	slices.Sort(files)
	for _, path := range files {
		if f, err := load(path, true); err == nil && f.Network == name {
			return f, nil
		}
	}
	return File{}, fmt.Errorf("%w: no such file, and no network of that name in %s; podgate cannot change a NetworkAttachmentDefinition",
		ErrDelegate, confDir)
}

// inDelegate changes the first delegate within the configuration of multus.
func inDelegate(b []byte, change func(list []byte) ([]byte, error)) ([]byte, error) {
	array, ok, err := member(b, "delegates")
	if err != nil || !ok {
		return nil, errors.Join(fmt.Errorf("%w: no delegates", ErrList), err)
	}
	all, err := elements(array.of(b))
	if err != nil || len(all) == 0 {
		return nil, errors.Join(fmt.Errorf("%w: no delegates", ErrList), err)
	}
	at := all[0].shift(array.start)
	changed, err := change(at.of(b))
	if err != nil {
		return nil, fmt.Errorf("delegates[0]: %w", err)
	}
	return slices.Concat(b[:at.start], changed, b[at.end:]), nil
}

// ListPath is where the list goes that is made of a single plugin's file: beside
// it, under the same name.
func (f File) ListPath() string {
	if f.Form != FormSingle {
		return f.Path
	}
	return strings.TrimSuffix(f.Path, filepath.Ext(f.Path)) + ".conflist"
}

// Gated are the networks of dir that have podgate-cni in their list, with the
// plugins of their folders, whichever of them runtimes take.
func Gated(dir string) ([]*libcni.NetworkConfigList, error) {
	files, err := libcni.ConfFiles(dir, []string{".conf", ".conflist", ".json"})
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", dir, err)
	}
	slices.Sort(files)
	var gated []*libcni.NetworkConfigList
	for _, path := range files {
		f, err := Load(path)
		if err != nil || f.Form == FormSingle {
			continue // No runtime calls podgate-cni for it.
		}
		b, err := os.ReadFile(f.Path)
		if err != nil {
			return nil, err
		}
		known := func(l *libcni.NetworkConfigList) bool { return l.Name == f.Network }
		if merged, err := f.Merged(b); err != nil || !merged || slices.ContainsFunc(gated, known) {
			continue
		}
		read := func(list []byte) ([]byte, error) {
			c, err := libcni.NetworkConfFromBytes(list)
			if err == nil {
				c.Plugins = append(c.Plugins, f.Beside...)
				gated = append(gated, c)
			}
			return list, err
		}
		if f.Form == FormDelegate {
			_, err = inDelegate(b, read)
		} else {
			_, err = read(b)
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", f.Path, err)
		}
	}
	return gated, nil
}
