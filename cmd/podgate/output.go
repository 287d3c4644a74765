// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
	"time"
	"unicode/utf8"
)

// The output formats.
const (
	outputText = "text"
	outputJSON = "json"
	// outputYAML is for commands that have it among their annotations.
	outputYAML = "yaml"
)

func outputs() []string { return []string{outputText, outputJSON} }

// print writes a value as JSON, or what text makes of it.
func (a *app) print(value any, text func(w *bytes.Buffer)) error {
	var b bytes.Buffer
	if a.output == outputJSON {
		enc := json.NewEncoder(&b)
		enc.SetIndent("", "  ")
		if err := enc.Encode(value); err != nil {
			return err
		}
	} else {
		text(&b)
	}
	_, err := b.WriteTo(a.Stdout)
	return err
}

// style is an SGR parameter (ECMA-48).
type style string

const (
	plain  style = ""
	bold   style = "1"
	faint  style = "2"
	red    style = "31"
	green  style = "32"
	yellow style = "33"
)

// paint colours text on a terminal, unless no-color.org says not to.
func (a *app) paint(s style, text string) string {
	const off = "NO_COLOR"
	if s == plain || !a.Terminal || a.Getenv(off) != "" || a.Getenv("TERM") == "dumb" {
		return text
	}
	return "\x1b[" + string(s) + "m" + text + "\x1b[0m"
}

// cell of a table.
type cell struct {
	text  string
	style style
}

// row makes cells without style.
func row(texts ...string) []cell {
	out := make([]cell, len(texts))
	for i, t := range texts {
		out[i].text = t
	}
	return out
}

// table writes rows in columns of equal width; the first row is the header.
func (a *app) table(w *bytes.Buffer, rows [][]cell) {
	for i := range rows[0] {
		rows[0][i].style = bold
	}
	a.columns(w, rows)
}

// columns writes rows in columns of equal width.
func (a *app) columns(w *bytes.Buffer, rows [][]cell) {
	var widths []int
	for _, r := range rows {
		for i, c := range r {
			if i == len(widths) {
				widths = append(widths, 0)
			}
			widths[i] = max(widths[i], utf8.RuneCountInString(c.text))
		}
	}
	for _, r := range rows {
		var b strings.Builder
		for i, c := range r {
			b.WriteString(a.paint(c.style, c.text))
			if i < len(r)-1 {
				b.WriteString(strings.Repeat(" ", widths[i]-utf8.RuneCountInString(c.text)+2))
			}
		}
		fmt.Fprintln(w, strings.TrimRight(b.String(), " "))
	}
}

// ago is a duration as a person reads it: "now", "12s", "3m", "4h", "5d".
func (a *app) ago(t time.Time) string {
	if t.IsZero() {
		return "never"
	}
	switch d := a.Now().Sub(t); {
	case d < time.Second:
		return "now"
	case d < time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", int(d.Hours()))
	default:
		return fmt.Sprintf("%dd", int(d.Hours()/24))
	}
}

// size is a number of bytes as a person reads it.
func size(n uint64) string {
	const unit = 1024
	if n < unit {
		return fmt.Sprintf("%d B", n)
	}
	value, exp := float64(n)/unit, 0
	for value >= unit && exp < 5 {
		value /= unit
		exp++
	}
	return fmt.Sprintf("%.1f %ciB", value, "KMGTPE"[exp])
}
