// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"

	"golang.org/x/term"
)

// style colours text for a terminal.
type style struct{ colour bool }

// newStyle is plain when f is no terminal or the environment says so
// (https://no-color.org).
func newStyle(f *os.File) style {
	const off = "NO_COLOR"
	return style{colour: term.IsTerminal(int(f.Fd())) && os.Getenv(off) == ""}
}

func (s style) bold(text string) string   { return s.sgr("1", text) }
func (s style) dim(text string) string    { return s.sgr("2", text) }
func (s style) red(text string) string    { return s.sgr("31", text) }
func (s style) green(text string) string  { return s.sgr("32", text) }
func (s style) yellow(text string) string { return s.sgr("33", text) }

func (s style) sgr(code, text string) string {
	if !s.colour {
		return text
	}
	return "\x1b[" + code + "m" + text + "\x1b[0m"
}
