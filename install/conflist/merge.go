// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package conflist

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/version"

	"github.com/podgate/podgate/conf"
)

// Type is the type of podgate's entry.
const Type = "podgate-cni"

// Oldest is the first CNI version whose lists podgate-cni can be part of:
// results of earlier ones name no interfaces.
const Oldest = "0.3.0"

// Reasons why a configuration cannot be merged into.
var (
	// ErrList: no network configuration list that libcni would load.
	ErrList = errors.New("not a network configuration list")
	// ErrVersion: the list is of a CNI version that podgate-cni does not speak.
	ErrVersion = errors.New("unsupported cniVersion")
	// ErrNoPlugins: the list has no plugin to go after. Its plugins may be in
	// files of their own (CNI specification 1.1, loadOnlyInlinedPlugins).
	ErrNoPlugins = errors.New("no plugin in the list itself")
	// ErrTwice: podgate-cni is in the list more than once.
	ErrTwice = errors.New("podgate-cni is there more than once")
)

// Entry is what podgate's entry is to say.
type Entry struct {
	// Options are further keys of podgate-cni's object, as a JSON object; none
	// when empty.
	Options json.RawMessage
	// Beside are plugins of the same network that are not in the list itself:
	// those of the folder that libcni loads after it.
	Beside []*libcni.PluginConfig
}

// capabilities are those that podgate-cni acts on. It wants what a neighbour
// will do to the interface, so that one nobody else has is not asked for:
// with a MAC announced that nothing sets, the pod's own would be refused.
func capabilities() []string { return []string{"bandwidth", "mac"} }

// Merge returns list with podgate-cni behind its last plugin. An entry that is
// there is brought up to date where it is; one that says the same already is
// left as it is written. It fails with [ErrList], [ErrVersion], [ErrNoPlugins],
// [ErrTwice] or, for options that podgate-cni would refuse, [conf.ErrInvalid]
// or [conf.ErrDecode].
func Merge(list []byte, e Entry) ([]byte, error) {
	at, err := read(list)
	if err != nil {
		return nil, err
	}
	return at.merge(list, e)
}

// Unmerge returns list without podgate-cni. It fails with [ErrList], and with
// [ErrNoPlugins] when no other plugin would be left.
func Unmerge(list []byte) ([]byte, error) {
	at, err := read(list)
	if err != nil {
		return nil, err
	}
	return at.unmerge(list)
}

// Merged tells whether podgate-cni is in the list. It fails with [ErrList].
func Merged(list []byte) (bool, error) {
	at, err := read(list)
	return err == nil && len(at.ours()) > 0, err
}

// chain is a list as libcni reads it, and where in the bytes its plugins are.
type chain struct {
	*libcni.NetworkConfigList
	spans []span
}

func read(list []byte) (*chain, error) {
	parsed, err := libcni.NetworkConfFromBytes(list)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrList, err)
	}
	c := &chain{NetworkConfigList: parsed}
	array, ok, err := member(list, "plugins")
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrList, err)
	}
	if !ok {
		return c, nil
	}
	if c.spans, err = elements(array.of(list)); err != nil {
		return nil, fmt.Errorf("%w: plugins: %w", ErrList, err)
	}
	if len(c.spans) != len(c.Plugins) {
		return nil, fmt.Errorf("%w: plugins: libcni reads %d, there are %d", ErrList, len(c.Plugins), len(c.spans))
	}
	for i := range c.spans {
		c.spans[i] = c.spans[i].shift(array.start)
	}
	return c, nil
}

// ours are the indices of podgate's entries.
func (c *chain) ours() (all []int) {
	for i, p := range c.Plugins {
		if p.Network.Type == Type {
			all = append(all, i)
		}
	}
	return all
}

func (c *chain) merge(list []byte, e Entry) ([]byte, error) {
	if err := c.mergeable(); err != nil {
		return nil, err
	}
	compact, err := c.object(e)
	if err != nil {
		return nil, err
	}
	ours := c.ours()
	switch {
	case len(ours) > 1:
		return nil, fmt.Errorf("%w: as plugins %v, counted from 0", ErrTwice, ours)
	case len(ours) == 1:
		at := c.spans[ours[0]]
		if same(at.of(list), compact) {
			return list, nil
		}
		_, lead := c.before(list, ours[0])
		return slices.Concat(list[:at.start], layout(compact, at.of(list), lead), list[at.end:]), nil
	}
	last := len(c.spans) - 1
	at := c.spans[last]
	separator, lead := c.before(list, last)
	if last == 0 && len(separator) == 0 {
		separator = afterColon(list)
	}
	entry := layout(compact, at.of(list), lead)
	return slices.Concat(list[:at.end], []byte{','}, separator, entry, list[at.end:]), nil
}

func (c *chain) mergeable() error {
	if c.CNIVersion == "" {
		return fmt.Errorf("%w: there is none, which means 0.1.0; want %s or later", ErrVersion, Oldest)
	}
	ok, err := version.GreaterThanOrEqualTo(c.CNIVersion, Oldest)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrVersion, err)
	}
	if !ok {
		return fmt.Errorf("%w: %s; want %s or later", ErrVersion, c.CNIVersion, Oldest)
	}
	if newer, err := version.GreaterThan(c.CNIVersion, version.Current()); err != nil || newer {
		return fmt.Errorf("%w: %s; %s is the latest there is", ErrVersion, c.CNIVersion, version.Current())
	}
	if len(c.Plugins) == len(c.ours()) {
		return fmt.Errorf("%w: the plugin that makes the interface has to be there", ErrNoPlugins)
	}
	return nil
}

// before is the white space in front of an element, and the indentation of the
// element's own line: nothing if it does not begin a line.
func (c *chain) before(list []byte, i int) (space, lead []byte) {
	start := c.spans[i].start
	space = list[len(bytes.TrimRight(list[:start], " \t\r\n")):start]
	if n := bytes.LastIndexByte(space, '\n'); n >= 0 {
		return space, space[n+1:]
	}
	return space, nil
}

// afterColon is a space where the file has one behind its first colon.
func afterColon(list []byte) []byte {
	if i := bytes.IndexByte(list, ':'); i >= 0 && i+1 < len(list) && list[i+1] == ' ' {
		return []byte{' '}
	}
	return nil
}

// object is podgate's entry without white space.
func (c *chain) object(e Entry) ([]byte, error) {
	wanted := map[string]bool{}
	for _, p := range slices.Concat(c.Plugins, e.Beside) {
		if p.Network.Type == Type {
			continue
		}
		for _, name := range capabilities() {
			if p.Network.Capabilities[name] {
				wanted[name] = true
			}
		}
	}
	b := []byte(`{"type":"` + Type + `"`)
	if len(wanted) > 0 {
		text, err := json.Marshal(wanted)
		if err != nil {
			return nil, err
		}
		b = append(append(b, `,"capabilities":`...), text...)
	}
	options, err := compactOptions(e.Options)
	if err != nil {
		return nil, err
	}
	return append(append(b, options...), '}'), nil
}

// compactOptions are the members of the options object, each after a comma.
func compactOptions(options json.RawMessage) ([]byte, error) {
	if len(bytes.TrimSpace(options)) == 0 {
		return nil, nil
	}
	if _, err := conf.Parse(options); err != nil {
		return nil, fmt.Errorf("options: %w", err)
	}
	for _, key := range []string{"type", "capabilities", "name", "cniVersion", "prevResult", "runtimeConfig"} {
		if _, ok, err := member(options, key); err != nil || ok {
			return nil, fmt.Errorf("options: %w: %s: not an option", conf.ErrInvalid, key)
		}
	}
	var b bytes.Buffer
	if err := json.Compact(&b, options); err != nil {
		return nil, fmt.Errorf("options: %w: %w", conf.ErrDecode, err)
	}
	members := bytes.TrimSuffix(bytes.TrimPrefix(b.Bytes(), []byte("{")), []byte("}"))
	if len(members) == 0 {
		return nil, nil
	}
	return slices.Concat([]byte{','}, members), nil
}

// layout writes an object the way its neighbour is written: on one line, or
// indented by lead and as much as the neighbour's members are.
func layout(compact, neighbour, lead []byte) []byte {
	body := bytes.TrimPrefix(neighbour, []byte("{"))
	space := body[:len(body)-len(bytes.TrimLeft(body, " \t\r\n"))]
	n := bytes.LastIndexByte(space, '\n')
	if n < 0 {
		return spaced(compact, space)
	}
	unit := []byte("  ")
	if inner := space[n+1:]; bytes.HasPrefix(inner, lead) && len(inner) > len(lead) {
		unit = inner[len(lead):]
	}
	var b bytes.Buffer
	// What is compacted is valid JSON.
	_ = json.Indent(&b, compact, string(lead), string(unit))
	if bytes.Contains(space, []byte("\r\n")) {
		return bytes.ReplaceAll(b.Bytes(), []byte("\n"), []byte("\r\n"))
	}
	return b.Bytes()
}

// spaced puts single spaces where people put them on one line, if the neighbour
// has one behind its brace.
func spaced(compact, space []byte) []byte {
	if len(space) == 0 {
		return compact
	}
	var b bytes.Buffer
	_ = json.Indent(&b, compact, "", "")
	// A line break of a string is written as \n and never as itself.
	return bytes.ReplaceAll(b.Bytes(), []byte("\n"), []byte(" "))
}

func (c *chain) unmerge(list []byte) ([]byte, error) {
	ours := c.ours()
	if len(ours) == 0 {
		return list, nil
	}
	if len(ours) == len(c.Plugins) {
		return nil, fmt.Errorf("%w: podgate-cni is the only one", ErrNoPlugins)
	}
	i := ours[len(ours)-1]
	cut := span{c.spans[0].start, c.spans[1].start}
	if i > 0 {
		cut = span{c.spans[i-1].end, c.spans[i].end}
	}
	rest := slices.Concat(list[:cut.start], list[cut.end:])
	again, err := read(rest)
	if err != nil {
		return nil, err
	}
	return again.unmerge(rest)
}
